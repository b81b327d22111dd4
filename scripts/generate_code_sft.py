"""Synthetic data that teaches a small model to answer with one runnable Python block, in Chinese and English.

Each row asks for a function and is answered with that function and a short test. Function name, constants and test
call stand in the prompt and are copied into the same places of the answer, so that even a model of a few million
parameters can learn it. The same seed gives the same bytes on every system.

    python scripts/generate_code_sft.py --out dataset/sft_code_5k.jsonl --n 5000 --seed 42
    python scripts/generate_code_sft.py --out dataset/sft_code_5k.jsonl --verify             # also run every answer
    python scripts/generate_code_sft.py --eval_out dataset/sample/code_eval.jsonl            # the ten test prompts
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.sandbox import extract_code, run_python
from scripts.code_tasks import TASKS, Task
from trainer.arguments import friendly_errors, output_path

CODE_SYSTEM = "你是严谨的编程助手。请只输出一个 Python 代码块，不要解释，不要反问。"
CODE_SYSTEM_EN = (
    "You are a careful programming assistant. Answer with one Python code block only, without explanations."
)
SYSTEM_WEIGHTS = {CODE_SYSTEM: 0.75, "": 0.15, CODE_SYSTEM_EN: 0.10}

OPENERS = {
    "zh": (
        "写一个Python函数$sig$text$tail。",
        "写一个Python函数$sig，$text$tail。",
        "请用Python写一个函数$sig，$text$tail。",
        "用Python实现函数$sig，$text$tail。",
        "请实现Python函数$sig：$text$tail。",
        "帮我写一个函数$sig，$text$tail。",
        "编写Python函数$sig，$text$tail。",
    ),
    "en": (
        "Write a Python function $sig that $text$tail.",
        "Please write a Python function $sig that $text$tail.",
        "Implement $sig in Python so that it $text$tail.",
        "Create a Python function $sig which $text$tail.",
        "Make a Python function $sig that $text$tail.",
        "Define a function $sig in Python that $text$tail.",
    ),
}
TAILS = {
    "zh": ("", "，并给出简单测试", "，并附上测试", "，最后打印一个例子"),
    "en": ("", ", and add a simple test", ", with a simple test", ", and print an example"),
}
EXAMPLE_TAILS = {
    "zh": ("，并用$call测试", "，并打印$call的结果", "，测试$call"),
    "en": (", and test it with $call", ", and print $call", ", then show $call"),
}
EXAMPLE_SHARE = 0.5  # of the prompts name the call that the answer has to print
CHINESE_SHARE = 0.55
SEEN_SHARE = 0.02  # of the rows are one of the five prompts that the evaluation repeats

WORDS = (
    "apple banana cat dog egg fish green hello ice jump kite lemon moon noon open python queen red sun tree under "
    "violet water yellow zebra level radar stats data code test book rain snow wind star"
).split()

# names that fit any task: because a name cannot be guessed from the task, a model has to learn to copy it
ANY_NAMES = "func solve solution compute answer task helper process run work demo".split()
PREFIXES = "my do get calc run new fast easy".split()


class Ask(NamedTuple):
    """One question: which family, with what constants, in what words. `example`: arguments of the call to print."""

    task: Task
    params: dict
    language: str
    opener: int
    text: str
    tail: str
    example: str
    name: str


def _ints(rng, low=3, high=5, largest=20):
    return rng.sample(range(largest), rng.randint(low, high))


def _words(rng, low, high):
    return rng.sample(WORDS, rng.randint(low, high))


def _pair_sum(rng):
    nums = _ints(rng)
    return f"{nums}, {sum(rng.sample(nums, 2))}"


def _sorted_target(rng):
    nums = sorted(_ints(rng, 4, 5))
    return f"{nums}, {rng.choice(nums)}"


# kind of argument -> its source text
EXAMPLES = {
    "digit": lambda rng: str(rng.randint(2, 9)),
    "n": lambda rng: str(rng.randint(2, 20)),
    "big": lambda rng: str(rng.randint(101, 999)),
    "year": lambda rng: str(rng.choice((1900, 2000, 2020, 2021, 2023, 2024, 2025, 2100))),
    "ints": lambda rng: str(_ints(rng)),
    "triple": lambda rng: str(_ints(rng, 3, 3)),
    "repeats": lambda rng: str([rng.randint(1, 4) for _ in range(5)]),
    "matrix": lambda rng: str([_ints(rng, 2, 2, 10), _ints(rng, 2, 2, 10)]),
    "pair_sum": _pair_sum,
    "sorted_target": _sorted_target,
    "word": lambda rng: json.dumps(rng.choice(WORDS)),
    "parts": lambda rng: json.dumps("${c}".join(_words(rng, 2, 3))),  # separated by the family's constant c
    "words": lambda rng: json.dumps(_words(rng, 2, 3)),
    "words3": lambda rng: json.dumps(_words(rng, 3, 3)),
    "sentence": lambda rng: json.dumps(" ".join(_words(rng, 2, 4))),
    "dict": lambda rng: json.dumps({word: rng.randint(1, 9) for word in _words(rng, 1, 2)}),
}


def _flat(params):
    """Parameters as names for the templates; a value that is a dict brings several."""
    flat = {}
    for name, value in params.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return flat


def prompt_of(ask: Ask) -> str:
    """The user's words."""
    values = _flat(ask.params) | {"sig": f"{ask.name}({ask.task.args})", "call": f"{ask.name}({ask.example})"}
    parts = {"text": Template(ask.text).substitute(values), "tail": Template(ask.tail).substitute(values)}
    return Template(OPENERS[ask.language][ask.opener]).substitute(values | parts)


def code_of(ask: Ask) -> str:
    """The function and its test, as Python source."""
    task, values = ask.task, _flat(ask.params)
    body = Template(task.body).substitute(values).replace("\n", "\n    ")
    examples = [ask.example] if ask.example else [Template(args).substitute(values) for args in task.default]
    calls = "\n".join(f"    print({ask.name}({args}))" for args in examples)
    return f'def {ask.name}({task.args}):\n    {body}\n\n\nif __name__ == "__main__":\n{calls}\n'


def answer_of(ask: Ask) -> str:
    """What the model is to say."""
    return f"```python\n{code_of(ask)}```"


def _draw_name(task, rng):
    name = rng.choice(task.names.split())
    if task.key == "fib" or rng.random() < 0.6:
        return name
    return rng.choice(ANY_NAMES) if rng.random() < 0.5 else f"{rng.choice(PREFIXES)}_{name}"


def draw(rng: random.Random) -> Ask:
    """One question at random, never one that is kept for evaluation."""
    task = rng.choices(TASKS, [task.weight for task in TASKS])[0]
    params = {name: rng.choice(values) for name, values in task.params.items()}
    language = "zh" if rng.random() < CHINESE_SHARE else "en"
    opener = rng.randrange(len(OPENERS[language]))
    text = rng.choice(getattr(task, language))
    example, tails = "", TAILS
    if task.example and rng.random() < EXAMPLE_SHARE:
        example = ", ".join(EXAMPLES[kind](rng) for kind in task.example.split(", "))
        example = Template(example).substitute(_flat(params))
        tails = EXAMPLE_TAILS
    name = _draw_name(task, rng)
    return Ask(task, params, language, opener, text, rng.choice(tails[language]), example, name)


def draw_new(rng: random.Random, used: set[str], attempts: int = 30) -> Ask:
    """A question that was not used before, apart from the function's name, as long as there are any."""
    for _ in range(attempts):
        ask = draw(rng)
        key = prompt_of(ask._replace(name="f"))
        if key not in used:
            used.add(key)
            break
    return ask


def _eval_ask(key, language, opener, text, tail=1, example=""):
    """A question of the evaluation; `text` and `tail` are indices, or the words themselves."""
    task = next(task for task in TASKS if task.key == key)
    text = getattr(task, language)[text] if isinstance(text, int) else text
    tail = (EXAMPLE_TAILS if example else TAILS)[language][tail]
    return Ask(task, {}, language, opener, text, tail, example, task.names.split()[0])


def seen_asks() -> list[tuple[Ask, str]]:
    """Five questions that the training data holds, with checks; the first is the one of the design document."""
    fib = "assert fib(10) == 55 and fib(0) == 0\nassert fib(1) == 1 and fib(20) == 6765"
    return [
        (_eval_ask("fib", "zh", 0, 0), fib),
        (_eval_ask("fib", "en", 0, 0), fib),
        (_eval_ask("gcd", "zh", 1, 0), "assert gcd(12, 18) == 6\nassert gcd(7, 5) == 1 and gcd(0, 4) == 4"),
        (
            _eval_ask("reverse_string", "en", 0, 0),
            "assert reverse_string('abc') == 'cba'\nassert reverse_string('') == ''",
        ),
        (_eval_ask("sum_digits", "zh", 2, 0), "assert sum_digits(123) == 6\nassert sum_digits(9050) == 14"),
    ]


def unseen_asks() -> list[tuple[Ask, str]]:
    """Five questions in wordings that no training row uses, with checks.

    They are chosen for a model of a few million parameters. Trained on 3000 rows for four epochs, such a model answered
    new wordings rightly, but held-out pairs of numbers never, and pairs of words seldom. So a good result here says
    that it understands new wordings, not that it copies constants well.
    """
    reverse, is_prime, factorial, vowels, gcd = (
        next(task for task in TASKS if task.key == key)
        for key in ("reverse_string", "is_prime", "factorial", "count_vowels", "gcd")
    )
    primes = "[n for n in range(30) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]"
    return [
        (
            _eval_ask("reverse_string", "zh", 1, reverse.held_out_zh),
            "assert reverse_string('abc') == 'cba'\nassert reverse_string('') == ''",
        ),
        (_eval_ask("is_prime", "zh", 1, is_prime.held_out_zh), f"assert {primes}"),
        (
            _eval_ask("factorial", "en", 0, factorial.held_out_en),
            "assert factorial(5) == 120\nassert factorial(1) == 1 and factorial(0) == 1",
        ),
        (
            _eval_ask("count_vowels", "en", 0, vowels.held_out_en),
            "assert count_vowels('HellO') == 2\nassert count_vowels('xyz') == 0",
        ),
        (_eval_ask("gcd", "en", 0, gcd.held_out_en), "assert gcd(12, 18) == 6\nassert gcd(7, 5) == 1"),
    ]


def eval_rows() -> list[dict]:
    """The ten rows of code_eval.jsonl: prompt, system, check (Python to append to the answer's code), seen."""
    marked = [(*pair, True) for pair in seen_asks()] + [(*pair, False) for pair in unseen_asks()]
    return [
        {"prompt": prompt_of(ask), "system": CODE_SYSTEM, "check": check, "seen": seen} for ask, check, seen in marked
    ]


def make_asks(n: int, seed: int) -> Iterator[tuple[str, Ask]]:
    """n pairs of a system prompt ("" for none) and a question."""
    rng = random.Random(seed)
    repeated = [ask for ask, _ in seen_asks()]
    used: set[str] = set()
    for _ in range(n):
        system = rng.choices(list(SYSTEM_WEIGHTS), SYSTEM_WEIGHTS.values())[0]
        if rng.random() < SEEN_SHARE:
            yield CODE_SYSTEM, rng.choice(repeated)
        else:
            yield system, draw_new(rng, used)


def make_rows(n: int, seed: int) -> Iterator[dict]:
    """n training rows, {"conversations": [...]}."""
    for system, ask in make_asks(n, seed):
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": prompt_of(ask)})
        turns.append({"role": "assistant", "content": answer_of(ask)})
        yield {"conversations": turns}


def verify(rows: list[dict]) -> int:
    """Run every distinct answer in the sandbox; returns their number.

    Raises:
        ValueError: with the first program that does not end with exit code 0, and what it said.
    """
    answers = list(dict.fromkeys(row["conversations"][-1]["content"] for row in rows))
    programs = [extract_code(answer) for answer in answers]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for program, result in zip(programs, pool.map(run_python, programs), strict=True):
            if not result.ok:
                raise ValueError(f"an answer does not run (exit code {result.returncode}):\n{program}\n{result.stderr}")
    return len(answers)


def write_rows(rows: list[dict], path: Path) -> None:
    """Write JSON lines all at once: a run that is interrupted leaves an older file as it was."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate synthetic Python code SFT data.")
    parser.add_argument("--out", help="the file to write, .jsonl")
    parser.add_argument("--n", type=int, default=5000, help="number of rows")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--verify", action="store_true", help="run every distinct answer before anything is written")
    parser.add_argument("--eval_out", help="also write the ten prompts of the evaluation to this file")
    args = parser.parse_args()
    if not args.out and not args.eval_out:
        parser.error("say where to write: --out FILE for training rows, --eval_out FILE for the evaluation prompts")
    if args.n < 1:
        parser.error(f"--n is {args.n}: it must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    if args.out:
        rows = list(make_rows(args.n, args.seed))
        if args.verify:
            print(f"Verified: all {verify(rows)} distinct answers run")
        write_rows(rows, output_path(args.out))
        print(f"Saved {len(rows)} code SFT samples -> {args.out}")
    if args.eval_out:
        write_rows(eval_rows(), output_path(args.eval_out))
        print(f"Saved {len(eval_rows())} code evaluation prompts -> {args.eval_out}")


if __name__ == "__main__":
    with friendly_errors():
        main()
