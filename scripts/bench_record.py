"""What the record of a run costs: the share of the training time that monitoring and saving take.

    python scripts/bench_record.py --preset small --data_path dataset/pretrain_hq.jsonl --batch_size 8 --max_seq_len 512
    python scripts/bench_record.py --preset tiny --data_path dataset/sample/pretrain.jsonl --log_interval 1

Takes the flags of a stage. For each --monitor a short run, in which the clock runs in all that is called beside the
forward pass, the backward pass and the optimizer: the log line with what it measures, the probes, and saving. Such
parts of a step are timed directly, as a difference between two runs would be lost in the noise of a shared machine.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import PretrainDataset
from trainer.arguments import ROOT, friendly_errors, model_config, stage_parser
from trainer.rows import open_rows
from trainer.train_run import TrainRun
from trainer.trainer_utils import init_environment, init_model

MODES = ("off", "light", "full")


def parse_args(argv=None):
    parser = stage_parser(
        "bench",
        save_weight="bench",
        from_weight="none",
        data_path=ROOT / "dataset" / "sample" / "pretrain.jsonl",
        epochs=1,
        batch_size=8,
        learning_rate=1e-4,
        max_seq_len=512,
    )
    parser.add_argument("--saves", type=int, default=5, help="saves that are timed")
    parser.set_defaults(max_steps=20, sample_prompts="none", curves=0, save_minutes=1e9)
    return parser.parse_args(argv)


def timed(owner, name: str, times: list) -> None:
    """Have the method `name` of an object note how long each call takes."""
    method = getattr(owner, name)

    def call(*args, **kwargs):
        began = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            times.append(time.perf_counter() - began)

    setattr(owner, name, call)


def watch(run: TrainRun) -> list:
    """The seconds of each call that monitoring makes."""
    times = []
    timed(run.book, "log", times)
    timed(run.guard, "read", times)
    if run.book.weights_probe is not None:
        for name in ("before", "after"):
            timed(run.book.weights_probe, name, times)
    if run.book.activations is not None:
        timed(run.book.activations, "start", times)
        timed(run.book.activations, "_see", times)
    return times


def train(run: TrainRun) -> list[float]:
    """Seconds of each update."""
    seconds, began = [], time.perf_counter()
    for epoch in run.epochs():
        for step, batch in run.batches(epoch):
            with run.attempt():
                with run.autocast():
                    output = run.model(**batch, return_logits=False)
                run.update(output.loss_sum, output.tokens, output.aux_loss)
            run.log(step)
            if run.closes_window:
                now = time.perf_counter()
                seconds.append(now - began)
                began = now
    return seconds


def measure(args, mode: str, folder: Path) -> None:
    args.monitor, args.save_dir, args.checkpoint_dir, args.runs_dir = mode, folder / "out", folder / "checkpoints", None
    lm_config = model_config(args)
    model, tokenizer = init_model(lm_config, args.from_weight, args.tokenizer_path, args.save_dir, args.device)
    dataset, val_dataset, collate = open_rows(args, tokenizer, PretrainDataset)
    with TrainRun(args, lm_config, model, dataset, collate, val_dataset, tokenizer) as run:
        times = watch(run)
        seconds = train(run)[1:]  # the first one warms up
        update = statistics.median(seconds)
        share = sum(times) / len(seconds) / update
        print(
            f"\n--monitor {mode}: {update * 1e3:,.0f} ms per update, monitoring {share:.2%} of it "
            f"(--log_interval {args.log_interval})\n"
        )
        if mode == MODES[-1]:
            saves = []
            timed(run, "_save_all", saves)
            for _ in range(args.saves):
                run._save_all(run.step, last=False)
            one = statistics.median(saves)
            print(
                f"\nsaving: {one:.2f} s, {one / 300:.2%} of five minutes; at most 2.5 % of the time, as it waits for "
                f"{one / 0.025 / 60:.1f} min or --save_minutes, whichever is longer\n"
            )


def main(args):
    init_environment(args)
    for mode in MODES:
        with tempfile.TemporaryDirectory() as folder:
            measure(args, mode, Path(folder))


if __name__ == "__main__":
    with friendly_errors():
        main(parse_args())
