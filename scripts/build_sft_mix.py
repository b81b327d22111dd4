"""Mixes a sample of general SFT rows with code rows that are repeated, so that a model sees enough code.

The base file is streamed: only the sampled rows are ever in memory, whatever its size. Every row is checked; the same
seed gives the same bytes.

    python scripts/build_sft_mix.py --base_path dataset/sft_mini_512.jsonl --base_n 50000 \
        --code_path dataset/sft_code_5k.jsonl --code_repeat 5 --out_path dataset/sft_mix_75k.jsonl --seed 42
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.jsonl import check_conversation, read_rows
from trainer.arguments import data_source, friendly_errors, output_path


def lines_of(path: str | Path, on_bad_row: str) -> Iterator[str]:
    """The checked rows of a file or hub data set, each as one line of JSON with its newline."""
    for _, row in read_rows(path, on_bad_row=on_bad_row, validate=check_conversation):
        yield json.dumps(row, ensure_ascii=False, default=str) + "\n"  # tables may hold dates


def reservoir(items: Iterable[str], size: int, rng: random.Random) -> tuple[list[str], int]:
    """A uniform sample of at most `size` items, and how many there were (Algorithm R, Vitter 1985)."""
    sample: list[str] = []
    count = 0
    for count, item in enumerate(items, start=1):
        if len(sample) < size:
            sample.append(item)
        elif (place := rng.randrange(count)) < size:
            sample[place] = item
    return sample, count


def refuse_overwriting(out: Path, inputs: Iterable[str]) -> None:
    """Raise ValueError if the output is one of the inputs, under whatever name."""
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder: name a file to write with --out_path")
    for path in inputs:
        if out.exists() and Path(path).exists() and out.samefile(path):
            raise ValueError(f"--out_path {out} is the input {path}: choose another name, or the input would be lost")


def write_lines(lines: Iterable[str], path: Path) -> None:
    """Write all at once: a run that is interrupted leaves an older file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        # half a surrogate pair has no UTF-8 form; written with a backslash it is the JSON escape that it came from
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.writelines(lines)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Mix sampled general SFT rows with repeated code rows.")
    parser.add_argument("--base_path", required=True, help="general SFT rows")
    parser.add_argument("--base_n", type=int, default=50000, help="rows to sample from them; all if there are fewer")
    parser.add_argument("--code_path", required=True, help="code rows, all of which are used")
    parser.add_argument("--code_repeat", type=int, default=5, help="how often each code row occurs")
    parser.add_argument("--out_path", required=True, help="the file to write, .jsonl")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--on_bad_row", choices=("raise", "skip"), default="raise")
    args = parser.parse_args()
    for name in ("base_n", "code_repeat"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} is {getattr(args, name)}: it must be 0 or more")
    if args.base_n == args.code_repeat == 0:
        parser.error("--base_n and --code_repeat are both 0: nothing would be written")
    return args


def main() -> None:
    args = parse_args()
    base_path, code_path, out = data_source(args.base_path), data_source(args.code_path), output_path(args.out_path)
    refuse_overwriting(out, (base_path, code_path))
    rng = random.Random(args.seed)
    base, available = reservoir(lines_of(base_path, args.on_bad_row), args.base_n, rng)
    print(f"Base: sampled {len(base)} from {available}")
    code = list(lines_of(code_path, args.on_bad_row))
    print(f"Code: {len(code)} * {args.code_repeat} = {len(code) * args.code_repeat}")
    mixed = base + code * args.code_repeat
    rng.shuffle(mixed)
    write_lines(mixed, out)
    print(f"Total mixed: {len(mixed)} -> {args.out_path}")


if __name__ == "__main__":
    with friendly_errors():
        main()
