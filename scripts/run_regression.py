"""Ask a model prompts whose right answers are known, greedily, and count: a gate for a model that was changed.

The prompts are those that a training asks with --regression_eval 1. Ends with status 1 where fewer are right than
--min_pass_rate says, and with 2 where they could not be asked. A model that was only pretrained continues them as text.

    python scripts/run_regression.py --weight full_sft
    python scripts/run_regression.py --weight full_sft --prompts my_prompts.jsonl --out report.json --min_pass_rate 0.5
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.generation import load_for_inference
from model.weights import write_json
from trainer.arguments import (
    ROOT,
    SAMPLE_DIR,
    add_model_flags,
    friendly_errors,
    input_path,
    output_path,
    positive_int,
    stated_sizes,
    weights_dir,
)
from trainer.hardware import choose_device
from trainer.regression import ANSWER_TOKENS, read_cases, run_cases


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--weight", default="full_sft")
    add("--save_dir", default=str(ROOT / "out"))
    add("--tokenizer_path", default=str(ROOT / "model"))
    add("--prompts", default=str(SAMPLE_DIR / "regression_prompts.jsonl"), help="rows as trainer/regression.py says")
    add("--out", default=None, help="also write the pass rate and the replies here, as JSON")
    add("--min_pass_rate", type=share, default=0.0, help="status 1 below this share of right answers; 0: never")
    add("--max_new_tokens", type=positive_int, default=ANSWER_TOKENS, help="of rows that do not say")
    add("--device", default="auto")
    add_model_flags(parser)
    return parser.parse_args(argv)


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def main(args) -> int:
    cases = read_cases(args.prompts)
    folder, tokenizer_path = weights_dir(args.save_dir), input_path(args.tokenizer_path)
    model, tokenizer, info = load_for_inference(
        args.weight, folder, tokenizer_path, stated_sizes(args), choose_device(args.device)
    )
    chat = not info.continues_text
    print(f"{info.path}" + ("" if chat else ": only pretrained, it continues the prompts"))
    found = run_cases(model, tokenizer, cases, chat, args.max_new_tokens, say=lambda text: print(text, flush=True))
    print(f"\n{found['passed']} of {found['total']} right, pass rate {found['pass_rate']:.3f}")
    if args.out:
        write_json(output_path(args.out), {"weights": str(info.path), "prompts": str(args.prompts), **found})
    if found["pass_rate"] < args.min_pass_rate:
        print(f"below --min_pass_rate {args.min_pass_rate:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    with friendly_errors():
        sys.exit(main(parse_args()))
