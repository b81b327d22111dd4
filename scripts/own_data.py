"""From your own text and conversations to a chat model: hold rows back, pretrain, fine-tune, ask, draw the curves.

It only runs the commands that it prints. A hundredth of the rows is held back, and its loss reported. The record of
each stage, with its curves, is below --out_dir/runs. Stopped? The same command with --from_resume 1 goes on.

    python scripts/own_data.py --pretrain my_texts.jsonl more.jsonl.gz --sft my_chats.jsonl --preset small
    python scripts/own_data.py --pretrain my_texts.jsonl --sft my_chats.jsonl --pretrain_steps 1000 --sft_steps 200 \
        --prompt "你好" --prompt "Write a Python function that adds two numbers."
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.arguments import ROOT, data_source, friendly_errors, output_path, positive_int

HELD_BACK = 0.01  # of the rows
PROMPTS = ("你好，请介绍一下自己。", "中国的首都是哪里？", "Write a Python function that adds two numbers.")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--pretrain", nargs="+", type=Path, required=True, help='files of {"text"} rows')
    add("--sft", nargs="+", type=Path, required=True, help="files of conversations")
    add("--preset", default="small")
    add("--out_dir", type=output_path, default=ROOT / "out" / "own_data", help="where rows, weights and curves go")
    add("--max_seq_len", type=positive_int, default=512)
    add("--batch_size", type=positive_int, default=8, help="rows of --max_seq_len tokens per update")
    add("--learning_rate", default="1e-3")
    add("--optimizer", default="adamw", choices=["adamw", "muon"])
    add("--pretrain_steps", type=int, default=0, help="updates; 0: once through the text")
    add("--sft_steps", type=int, default=0, help="updates; 0: once through the conversations")
    add("--from_resume", type=int, default=0, choices=[0, 1], help="1: go on where the same command was stopped")
    add("--prompt", action="append", default=[], help="asked at the end; may be repeated")
    return parser.parse_args(argv)


def run(*words) -> float:
    """Print and run one command in the root; returns seconds. A failure ends the script with its status."""
    words = [str(word) for word in words]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    began = time.monotonic()
    code = subprocess.call([sys.executable, *words], cwd=ROOT)
    if code:
        sys.exit(code if code > 0 else 1)
    return time.monotonic() - began


def absolute(source: Path) -> str:
    """A file as it is found from here, or else the name of a data set on the hub; the stages run in the root."""
    found = data_source(source)
    return str(Path(found).absolute()) if Path(found).exists() else found


def train(script: str, args, files: list[Path], steps: int, *flags) -> float:
    out = args.out_dir
    return run(
        *(f"trainer/{script}.py", "--save_dir", out, "--checkpoint_dir", out / "checkpoints", *flags),
        *("--data_path", *map(absolute, files), "--val_ratio", HELD_BACK, "--on_bad_row", "skip"),
        *("--max_seq_len", args.max_seq_len, "--batch_size", args.batch_size, "--learning_rate", args.learning_rate),
        *("--epochs", 1, "--max_steps", steps, "--preset", args.preset, "--optimizer", args.optimizer),
        *("--from_resume", args.from_resume),
    )


def run_folder(out: Path, name: str) -> Path:
    """The directory of the stage's run that has just ended; earlier ones, of other sizes too, may lie beside it."""
    return max((out / "runs").glob(f"{name}_*/summary.json"), key=lambda path: path.stat().st_mtime).parent


def report(out: Path, seconds: dict[str, float]) -> None:
    for name, elapsed in seconds.items():
        summary = run_folder(out, name) / "summary.json"
        metrics = json.loads(summary.read_text(encoding="utf-8"))["metrics"]
        print(
            f"{name}: {elapsed / 60:.1f} min, {metrics['tokens_per_second']:,.0f} trained tokens/s, "
            f"held-back loss {metrics['val_loss']:.3f}, perplexity {metrics['val_ppl']:.1f}"
        )


def main(args):
    out = args.out_dir
    seconds = {"pretrain": train("train_pretrain", args, args.pretrain, args.pretrain_steps)}
    seconds["full_sft"] = train("train_full_sft", args, args.sft, args.sft_steps, "--from_weight", "pretrain")
    for prompt in args.prompt or PROMPTS:
        run("eval_llm.py", "--save_dir", out, "--preset", args.preset, "--prompt", prompt)
    run("scripts/plot_metrics.py", *(run_folder(out, name) for name in seconds), "--out", out / "curves.png")
    print("\n" + "-" * 80)
    report(out, seconds)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    with friendly_errors():
        main(parse_args())
