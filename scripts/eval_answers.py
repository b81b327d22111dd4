"""Ask a model questions whose right answers are known, greedily, and count: code is run, chat is looked up.

Code answers run in the sandbox together with a check that asserts what the function must return; a chat answer must
contain what the row expects. Rows that must be new to the model are looked for in the training file first.

    python scripts/eval_answers.py --weight full_sft
    python scripts/eval_answers.py --weight full_sft --train_path out/quickstart/sft_mix.jsonl --json out/answers.json
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.jsonl import read_rows
from model.generation import load_for_inference
from model.sandbox import active_guards, judge_code
from model.weights import write_json
from trainer.arguments import (
    ROOT,
    SAMPLE_DIR,
    add_model_flags,
    friendly_errors,
    input_path,
    output_path,
    stated_sizes,
    weights_dir,
)
from trainer.hardware import choose_device
from trainer.regression import ask, why_missing


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--weight", default="full_sft")
    add("--save_dir", default=str(ROOT / "out"))
    add("--tokenizer_path", default=str(ROOT / "model"))
    add("--code_path", default=str(SAMPLE_DIR / "code_eval.jsonl"), help='rows {"prompt", "system", "check", "seen"}')
    add("--chat_path", default=str(SAMPLE_DIR / "chat_eval.jsonl"), help='rows {"prompt", "system", "expect"}')
    add("--train_path", default=None, help='training rows in which no prompt with "seen": false may occur')
    add("--max_new_tokens", type=int, default=300)
    add("--json", default=None, help="also write the answers and counts here")
    add("--device", default="auto")
    add_model_flags(parser)
    return parser.parse_args(argv)


def read_questions(path: str) -> list[dict]:
    return [row for _, row in read_rows(input_path(path))]


def refuse_seen(questions: list[dict], train_path: str) -> None:
    """Raise ValueError if a question that should be new is among the prompts of the training file."""
    new = {row["prompt"] for row in questions if not row.get("seen", True)}
    for line, row in read_rows(input_path(train_path)):
        for message in row.get("conversations", []):
            if message["role"] == "user" and message["content"] in new:
                raise ValueError(
                    f"{train_path}:{line} holds {message['content']!r}, which should be new to the model: "
                    "the answer to it proves nothing"
                )


def judge_chat(answer: str, expect: list[list[str]]) -> dict:
    """{"right"}: of each list of alternatives at least one occurs, upper and lower case alike."""
    return {"right": not why_missing(answer, expect)}


def main(args):
    code, chat = read_questions(args.code_path), read_questions(args.chat_path)
    if args.train_path:
        refuse_seen(code, args.train_path)
    model, tokenizer, info = load_for_inference(
        args.weight,
        weights_dir(args.save_dir),
        input_path(args.tokenizer_path),
        stated_sizes(args),
        choose_device(args.device),
    )
    print(f"{info.path}; code runs under: {'; '.join(active_guards())}")
    results = []
    for kind, rows in (("code", code), ("chat", chat)):
        for row in rows:
            text = ask(model, tokenizer, row, chat=True, max_new_tokens=args.max_new_tokens)
            verdict = judge_code(text, row["check"]) if kind == "code" else judge_chat(text, row["expect"])
            results.append({"kind": kind, "prompt": row["prompt"], "new": not row.get("seen", True), "answer": text})
            results[-1] |= verdict
            mark = "right" if verdict["right"] else "wrong"
            print(
                f"\n[{mark}]{' (new to the model)' if results[-1]['new'] else ''} {row['prompt']}\n{text}", flush=True
            )
            if verdict.get("error"):
                print(f"    -> {verdict['error']}")
    summary = {
        "code": len(code),
        "code_ran": sum(r.get("ran", False) for r in results),
        "code_right": sum(r["right"] for r in results if r["kind"] == "code"),
        "code_new": sum(r["new"] for r in results if r["kind"] == "code"),
        "code_new_right": sum(r["right"] for r in results if r["kind"] == "code" and r["new"]),
        "chat": len(chat),
        "chat_right": sum(r["right"] for r in results if r["kind"] == "chat"),
    }
    print(
        f"\ncode: {summary['code_ran']} of {summary['code']} ran, {summary['code_right']} right "
        f"(new to the model: {summary['code_new_right']} of {summary['code_new']}); "
        f"chat: {summary['chat_right']} of {summary['chat']} right"
    )
    if args.json:
        write_json(output_path(args.json), {"weights": str(info.path), "summary": summary, "answers": results})


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    with friendly_errors():
        main(parse_args())
