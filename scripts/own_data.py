"""From your own text and conversations to a chat model: hold rows back, pretrain, fine-tune, ask, draw the curves.

It only runs the commands that it prints. Every hundredth row of each file is held back, and its loss reported.

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

from dataset.jsonl import check_conversation, check_pretrain, read_rows
from trainer.arguments import ROOT, friendly_errors, input_path, output_path, positive_int

HELD_BACK = 100  # one row in so many
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
    add("--prompt", action="append", default=[], help="asked at the end; may be repeated")
    return parser.parse_args(argv)


def hold_back(paths: list[Path], check, kept: Path, held: Path) -> None:
    """Copy good rows into `kept`, every hundredth one into `held`."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("w", encoding="utf-8", newline="\n") as train, held.open("w", encoding="utf-8", newline="\n") as val:
        counts = [0, 0]
        for path in paths:
            for number, (_, row) in enumerate(read_rows(input_path(path), "skip", check), start=1):
                is_held = number % HELD_BACK == 0
                (val if is_held else train).write(json.dumps(row, ensure_ascii=False) + "\n")
                counts[is_held] += 1
    if not counts[1]:
        raise ValueError(f"{kept.stem}: {counts[0]} rows, too few to hold one in {HELD_BACK} back: give more")
    print(f"{kept.stem}: {counts[0]:,} rows to train on, {counts[1]:,} held back", flush=True)


def run(*words) -> float:
    """Print and run one command in the root; returns seconds. A failure ends the script with its status."""
    words = [str(word) for word in words]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    began = time.monotonic()
    code = subprocess.call([sys.executable, *words], cwd=ROOT)
    if code:
        sys.exit(code if code > 0 else 1)
    return time.monotonic() - began


def train(script: str, args, kind: str, steps: int, *flags) -> float:
    out = args.out_dir
    return run(
        *(f"trainer/{script}.py", "--save_dir", out, "--checkpoint_dir", out / "checkpoints", *flags),
        *("--data_path", out / f"{kind}.jsonl", "--val_path", out / f"{kind}_val.jsonl", "--max_steps", steps),
        *("--max_seq_len", args.max_seq_len, "--batch_size", args.batch_size, "--learning_rate", args.learning_rate),
        *("--epochs", 1, "--preset", args.preset, "--optimizer", args.optimizer),
    )


def curve(out: Path, name: str) -> Path:
    """The metrics file that the stage has just written; an older run of another size may have left one, too."""
    return max(out.glob(f"{name}_*.metrics.jsonl"), key=lambda path: path.stat().st_mtime)


def report(out: Path, seconds: dict[str, float]) -> None:
    for name, elapsed in seconds.items():
        path = Path(str(curve(out, name)).removesuffix(".metrics.jsonl") + ".json")
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        print(
            f"{name}: {elapsed / 60:.1f} min, {metrics['tokens_per_second']:,.0f} trained tokens/s, "
            f"held-back loss {metrics['val_loss']:.3f}, perplexity {metrics['val_ppl']:.1f}"
        )


def main(args):
    out = args.out_dir
    hold_back(args.pretrain, check_pretrain, out / "pretrain.jsonl", out / "pretrain_val.jsonl")
    hold_back(args.sft, check_conversation, out / "sft.jsonl", out / "sft_val.jsonl")
    seconds = {"pretrain": train("train_pretrain", args, "pretrain", args.pretrain_steps)}
    seconds["full_sft"] = train("train_full_sft", args, "sft", args.sft_steps, "--from_weight", "pretrain")
    for prompt in args.prompt or PROMPTS:
        run("eval_llm.py", "--save_dir", out, "--preset", args.preset, "--prompt", prompt)
    run("scripts/plot_metrics.py", *(curve(out, name) for name in seconds), "--out", out / "curves.png")
    print("\n" + "-" * 80)
    report(out, seconds)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    with friendly_errors():
        main(parse_args())
