"""A small training run over random tokens, in process or under torchrun: the tests compare the weights that it leaves.

python tests/toy_run.py --save_dir out --checkpoint_dir checkpoints [flags of a stage] [--stop_after N]
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.arguments import friendly_errors, stage_parser
from trainer.train_pretrain import train_epoch
from trainer.train_run import TrainRun
from trainer.trainer_utils import init_environment

TOKENS = 24


class RandomTokens(torch.utils.data.Dataset):
    """Rows of different lengths, so that a mean of means is not the mean."""

    def __init__(self, rows: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, 64, (rows, TOKENS), generator=generator)
        self.lengths = torch.randint(2, TOKENS + 1, (rows,), generator=generator).tolist()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return self.ids[index], self.lengths[index]


def collate(rows):
    ids = torch.stack([ids for ids, _ in rows])
    places = torch.arange(TOKENS)
    real = torch.stack([places < length for _, length in rows])
    return {"input_ids": ids, "labels": ids.masked_fill(~real, -100), "attention_mask": real.long()}


class Stop(Exception):
    pass


def parse(argv):
    parser = stage_parser(
        "Toy",
        save_weight="toy",
        from_weight="none",
        data_path="random",
        epochs=2,
        batch_size=4,
        learning_rate=1e-2,
        max_seq_len=TOKENS,
    )
    parser.add_argument("--rows", type=int, default=37)
    parser.add_argument("--stop_after", type=int, default=0, help="die after so many updates in all")
    parser.add_argument("--send", default="", help="NAME[,NAME]:UPDATE[:RANK] that the process gets")
    parser.add_argument("--oom", default="", help="ROWS[:RANK]: more rows in one forward pass do not fit")
    parser.set_defaults(dtype="float32", device="cpu", hidden_size=32, log_interval=1)
    return parser.parse_args([str(a) for a in argv])


def config(args):
    return MiniMindConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        dropout=args.dropout or 0.0,
        use_moe=bool(args.use_moe),
        n_routed_experts=3,
        moe_intermediate_size=32,
    )


def interrupt(run, after, action):
    """Have run.save do `action` at the end of update number `after`, before anything is saved."""
    save = run.save

    def saving(step):
        if run.closes_window and run.updates == after:
            action()
        save(step)

    run.save = saving


def die_after_saving(run, after):
    save = run.save

    def save_then_die(step):
        save(step)
        if run.closes_window and run.updates == after:
            raise Stop

    run.save = save_then_die


def limit_memory(model, rows):
    """Let a forward pass over more rows fail half way, as a GPU's memory would."""

    def check(_, inputs, kwargs):
        if model.training and len(kwargs["input_ids"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(check, with_kwargs=True)


def on_this_rank(words, place):
    return len(words) <= place or int(words[place]) == int(os.environ.get("RANK", 0))


def train(args):
    """Train and return the TrainRun."""
    init_environment(args)
    lm_config = config(args)
    model = MiniMindForCausalLM(lm_config)
    oom = args.oom.split(":")
    if args.oom and on_this_rank(oom, 1):
        limit_memory(model, int(oom[0]))
    rows, val_rows = RandomTokens(args.rows), RandomTokens(11, seed=1)
    with TrainRun(args, lm_config, model, rows, collate, val_rows) as run:
        if args.stop_after:
            die_after_saving(run, args.stop_after)
        words = args.send.split(":")
        if args.send and on_this_rank(words, 2):
            names = words[0].split(",")
            interrupt(run, int(words[1]), lambda: [os.kill(os.getpid(), signal.Signals[f"SIG{n}"]) for n in names])
        for epoch in run.epochs():
            train_epoch(epoch, run)
    return run


if __name__ == "__main__":
    with friendly_errors():
        train(parse(sys.argv[1:]))
