"""A small training run over random tokens, in process or under torchrun: the tests compare the weights that it leaves.

python tests/toy_run.py --save_dir out --checkpoint_dir checkpoints [flags of a stage] [--stop_after N]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.arguments import stage_parser
from trainer.train_pretrain import train_epoch, validate
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


def train(args):
    """Train and return the TrainRun."""
    init_environment(args)
    lm_config = config(args)
    run = TrainRun(
        args, lm_config, MiniMindForCausalLM(lm_config), RandomTokens(args.rows), collate, RandomTokens(11, seed=1)
    )
    for epoch in run.epochs():
        if args.stop_after:
            save = run.save

            def save_then_die(step, save=save):
                save(step)
                if run.closes_window and run.monitor.done == args.stop_after:
                    raise Stop

            run.save = save_then_die
        train_epoch(epoch, run)
        validate(run)
    run.finish()
    return run


if __name__ == "__main__":
    train(parse(sys.argv[1:]))
