"""From an empty disk to a chat model that you trained yourself: every stage once, on the sample data, in minutes.

It only runs the commands that it prints; type them yourself to do the same. It ends with a summary, and with a non-zero
status if the model did not learn: the pretrained one must beat the entropy of single tokens, the fine-tuned one must
write Fibonacci functions that run, and answer the test questions.

    make quickstart
    python scripts/quickstart.py --out_dir out --steps sft,answers       # only some of the steps
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.arguments import ROOT, SAMPLE_DIR, friendly_errors, output_path

STEPS = ("data", "pretrain", "sft", "answers")
CODE_RIGHT, CHAT_RIGHT = 9, 4  # of 10 code prompts and of 5 questions


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out_dir", type=output_path, default=ROOT / "out", help="where weights and data go")
    parser.add_argument("--steps", default=",".join(STEPS), help="which steps to run")
    args = parser.parse_args(argv)
    args.steps = args.steps.split(",")
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"no step {', '.join(sorted(unknown))}: choose of {', '.join(STEPS)}")
    return args


def show(path: Path) -> str:
    """A path as a user in the root would type it."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def run(script: str, *flags) -> float:
    """Print and run one command in the root; returns seconds. A failure ends the quickstart."""
    words = [script, *(show(flag) if isinstance(flag, Path) else str(flag) for flag in flags)]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    began = time.monotonic()
    code = subprocess.call([sys.executable, *words], cwd=ROOT)
    if code:
        print(f"\nthe command above ended with status {code}: the quickstart stops here", file=sys.stderr)
        sys.exit(code if code > 0 else 1)
    return time.monotonic() - began


def make_data(data: Path) -> None:
    run("scripts/generate_sample_data.py")
    run("scripts/generate_code_sft.py", "--out", data / "sft_code.jsonl", "--n", 3000, "--seed", 42)
    run(
        *("scripts/build_sft_mix.py", "--base_path", SAMPLE_DIR / "sft.jsonl", "--base_n", 50000),
        *("--code_path", data / "sft_code.jsonl", "--code_repeat", 1, "--out_path", data / "sft_mix.jsonl"),
    )


def pretrain(args) -> float:
    return run(
        *("trainer/train_pretrain.py", "--preset", "tiny", "--save_dir", args.out_dir),
        *("--checkpoint_dir", args.out_dir / "quickstart"),
        *("--data_path", SAMPLE_DIR / "pretrain.jsonl", "--val_path", SAMPLE_DIR / "pretrain_val.jsonl"),
        *("--batch_size", 4, "--learning_rate", "2e-3"),
    )


def fine_tune(args, data: Path) -> float:
    return run(
        *("trainer/train_full_sft.py", "--from_weight", "pretrain", "--preset", "tiny", "--save_dir", args.out_dir),
        *("--checkpoint_dir", args.out_dir / "quickstart"),
        *("--data_path", data / "sft_mix.jsonl", "--val_path", SAMPLE_DIR / "sft_val.jsonl"),
        *("--epochs", 4, "--batch_size", 3, "--learning_rate", "2e-3"),
    )


def unigram_entropy(path: Path) -> float:
    """Entropy in nats of the tokens of a pretraining file, each by itself: what a model that counts words reaches."""
    from dataset.jsonl import read_rows
    from model.chat import encode_texts
    from trainer.trainer_utils import init_tokenizer

    texts = [row["text"] for _, row in read_rows(path)]
    counts = Counter(token for ids in encode_texts(init_tokenizer(ROOT / "model"), texts) for token in ids)
    total = counts.total()
    return -sum(n / total * math.log(n / total) for n in counts.values())


def report(args, seconds: dict, began: float) -> bool:
    """Print the summary; returns whether the model learned what it must."""
    pretrained = json.loads((args.out_dir / "pretrain_256.json").read_text(encoding="utf-8"))["metrics"]
    tuned = json.loads((args.out_dir / "full_sft_256.json").read_text(encoding="utf-8"))["metrics"]
    answers = json.loads((args.out_dir / "quickstart/answers.json").read_text(encoding="utf-8"))
    counts, entropy = answers["summary"], unigram_entropy(SAMPLE_DIR / "pretrain_val.jsonl")
    fibonacci = [a["right"] for a in answers["answers"]][:2]  # one in Chinese, one in English
    checks = {
        f"pretraining: held-back loss {pretrained['val_loss']:.2f} is below the unigram entropy {entropy:.2f}": (
            pretrained["val_loss"] < entropy
        ),
        "both Fibonacci prompts give code that runs, with fib(10) = 55": all(fibonacci),
        f"code: {counts['code_right']} of {counts['code']} right, {counts['code_ran']} ran, {CODE_RIGHT} needed "
        f"(of those new to the model {counts['code_new_right']} of {counts['code_new']})": counts["code_right"]
        >= CODE_RIGHT,
        f"{counts['code_new']} of the code prompts are in no training row, 5 needed": counts["code_new"] >= 5,
        f"chat: {counts['chat_right']} of {counts['chat']} right, {CHAT_RIGHT} needed": (
            counts["chat_right"] >= CHAT_RIGHT
        ),
    }
    print("\n" + "-" * 80)
    for name, metrics in (("pretrain", pretrained), ("sft", tuned)):
        minutes = f"{seconds[name] / 60:.1f} min, " if name in seconds else ""
        print(
            f"{name}: {minutes}{metrics['tokens_per_second']:,.0f} trained tokens/s, loss {metrics['loss']:.3f}, "
            f"held-back loss {metrics['val_loss']:.3f}, perplexity {metrics['val_ppl']:.2f}"
        )
    print(f"in all: {(time.monotonic() - began) / 60:.1f} min\n")
    for text, passed in checks.items():
        print(f"[{'ok' if passed else 'FAILED'}] {text}")
    return all(checks.values())


NEXT = """
What to type next (`. .venv/bin/activate` first, so that python is the one with torch):
  python eval_llm.py                                         chat with what you trained
  python eval_llm.py --weight pretrain --prompt "太阳"       see what it knew before fine-tuning
  python trainer/train_pretrain.py --preset small --data_path dataset/pretrain_hq.jsonl
                                                             a bigger model on real data: see README.md
"""


def main(args):
    began, seconds, data = time.monotonic(), {}, args.out_dir / "quickstart"
    if "data" in args.steps:
        make_data(data)
    if "pretrain" in args.steps:
        seconds["pretrain"] = pretrain(args)
    if "sft" in args.steps:
        seconds["sft"] = fine_tune(args, data)
    if "answers" in args.steps:
        run(
            *("scripts/eval_answers.py", "--weight", "full_sft", "--preset", "tiny", "--save_dir", args.out_dir),
            *("--train_path", data / "sft_mix.jsonl", "--json", data / "answers.json"),
        )
        passed = report(args, seconds, began)
        print(NEXT)
        sys.exit(0 if passed else 1)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    with friendly_errors():
        main(parse_args())
