"""Clean rows of SFT or pretraining: repair what is safe to repair, drop faulty, repeated, too long and leaked rows.

Says what it did and where. The input is never written to; the output appears in one step when all of it is there.

    python scripts/clean_data.py --in dataset/sft_zh.jsonl dataset/sft_en.jsonl --out out/clean.jsonl
    python scripts/clean_data.py --in raw.jsonl.gz --out clean.jsonl --near_dup 1 --max_len 512 --report clean.json
    python scripts/clean_data.py --in dataset/sft_code.jsonl --out clean.jsonl --against dataset/sample/code_eval.jsonl

Repaired: byte order marks, white space at the end of texts, system messages that say nothing. Dropped: what training
refuses (empty or null texts, unknown roles, no reply, broken JSON), rows that repeat an earlier one, also of another
file or format; with --near_dup 1 those that resemble an earlier one (which may itself resemble a third); with --max_len
those of more tokens; with --against those that share 13 words or Han characters in a row with an evaluation text, or a
whole message with a shorter one. Near duplicates need datasketch (pip install -r requirements-data.txt).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from dataset.diagnosis import (
    Facts,
    Inspection,
    Overlap,
    Signer,
    evaluated_texts,
    first_equal,
    first_similar,
    inspect_rows,
    joined_columns,
    refuse_taken,
    repaired,
    stage_of,
)
from dataset.encode import FrozenTokenizer
from dataset.jsonl import read_rows
from dataset.token_cache import worker_count
from trainer.arguments import ROOT, fraction, friendly_errors, input_path, output_path, positive_int, zero_or_one

EXAMPLES = 3
LISTED = 1000  # lines of a cause that the report names


class Account:
    """What was done and where: for each cause how many rows, and the places of some."""

    def __init__(self):
        self.counts: Counter = Counter()
        self.places: dict[str, list[str]] = {}

    def add(self, cause: str, place: str) -> None:
        self.counts[cause] += 1
        places = self.places.setdefault(cause, [])
        if len(places) < LISTED:
            places.append(place)

    def lines(self) -> list[str]:
        return [
            f"  {cause}: {count}, {', '.join(self.places[cause][:EXAMPLES])}{', ...' if count > EXAMPLES else ''}"
            for cause, count in self.counts.most_common()
        ]

    def report(self) -> dict:
        return {cause: {"count": count, "places": self.places[cause]} for cause, count in self.counts.most_common()}


# --- reading ----------------------------------------------------------------------------------------------------------


def find_stage(paths: list[Path]) -> str:
    """The stage of the first row of the first file that is an object."""
    for _, raw in read_rows(paths[0]).raw:
        try:
            return stage_of(repaired(raw)[0])
        except ValueError:
            continue
    return "sft"


def read_overlap(paths: list[Path], size: int) -> Overlap | None:
    """The n-grams of evaluation files; a row of them that cannot be read is an error."""
    if not paths:
        return None
    rows = (row for path in paths for _, row in read_rows(path, validate=evaluated_texts))
    return Overlap.of((text for row in rows for text in evaluated_texts(row)), size)


def inspect_file(path: Path, inspection: Inspection, dropped: Account, mended: Account) -> list[Facts]:
    """The facts of all rows of a file. Raises ValueError if none of them is good."""
    from tqdm import tqdm

    reader, parts = read_rows(path, "skip"), []
    looks = {"total": reader.size or None, "unit": "B", "unit_scale": True}
    batches = inspect_rows(reader.raw, inspection, worker_count(path))
    with closing(batches), tqdm(desc=path.name, disable=None, delay=2, leave=False, **looks) as bar:
        for facts in batches:
            parts.append(facts)
            reader.rows += len(facts.columns["line"])
            for _, line, reason in facts.bad:
                reader.reject(line, reason)
                dropped.add(reason.split(":")[0], f"{path}:{line}")
            for line, what in facts.repaired:
                mended.add(what, f"{path}:{line}")
            bar.update(reader.position - bar.n)
    if not reader.rows:
        reader.finish()
    return parts


def inspect_files(paths: list[Path], inspection: Inspection, dropped: Account, mended: Account) -> Rows:
    """The good rows of all files. Raises ValueError for a file without any."""
    tables, total = [], 0
    for number, path in enumerate(paths):
        parts = inspect_file(path, inspection, dropped, mended)
        total += sum(part.rows for part in parts)
        columns = joined_columns(parts)
        tables.append(columns | {"file": np.full(len(columns["line"]), number)})
    return Rows(paths, total, {name: np.concatenate([table.pop(name) for table in tables]) for name in list(tables[0])})


# --- deciding ---------------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """The good rows of all files: `columns` of `dataset.diagnosis.Facts`, and the file; `total`: with bad ones."""

    paths: list[Path]
    total: int
    columns: dict[str, np.ndarray]

    def place(self, row: int) -> str:
        return f"{self.paths[self.columns['file'][row]]}:{self.columns['line'][row]}"

    def choose(self, args: argparse.Namespace, dropped: Account) -> np.ndarray:
        """Which rows stay, bool [D]; each of the others is accounted for once."""
        columns = self.columns
        keep = np.ones(len(columns["hash"]), bool)
        if args.against:
            self._drop(columns["overlap"], keep, "overlap with --against", dropped)
        if args.max_len and args.long == "drop":
            self._drop(columns["length"] > args.max_len, keep, f"longer than {args.max_len} tokens", dropped)
        rows = np.flatnonzero(keep)
        self._drop_copies(rows, rows[first_equal(columns["hash"][rows])], keep, "exact duplicate", dropped)
        if args.near_dup:
            rows = np.flatnonzero(keep)
            similar = first_similar(columns["digests"][rows], columns["signatures"][rows], args.near_threshold)
            self._drop_copies(rows, rows[similar], keep, "near duplicate", dropped)
        return keep

    def _drop(self, which: np.ndarray, keep: np.ndarray, cause: str, dropped: Account) -> None:
        for row in np.flatnonzero(which & keep):
            dropped.add(cause, self.place(row))
        keep &= ~which

    def _drop_copies(self, rows: np.ndarray, first: np.ndarray, keep: np.ndarray, cause: str, dropped: Account) -> None:
        for row, earlier in zip(rows[first != rows], first[first != rows], strict=True):
            dropped.add(cause, f"{self.place(row)} of {self.place(earlier)}")
            keep[row] = False


# --- writing ----------------------------------------------------------------------------------------------------------


def state_of(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def kept_lines(rows: Rows, keep: np.ndarray) -> Iterator[str]:
    """The rows that stay, repaired, as lines of JSON: the files are read a second time, as no text was kept."""
    for number, path in enumerate(rows.paths):
        positions = set(rows.columns["position"][keep & (rows.columns["file"] == number)].tolist())
        for position, (_, raw) in enumerate(read_rows(path).raw):
            if position in positions:
                yield json.dumps(repaired(raw)[0], ensure_ascii=False, default=str) + "\n"  # tables may hold dates


def write_rows(path: Path, rows: Rows, keep: np.ndarray, states: list[tuple[int, int]]) -> None:
    """Write the rows that stay, all at once; raises ValueError if an input is not what it was at the start."""
    from model.weights import atomic_write  # takes a second to import: not for --help

    def write(temporary: str) -> None:
        # half a surrogate pair has no UTF-8 form; written with a backslash it is the JSON escape that it came from
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.writelines(kept_lines(rows, keep))
        for source, state in zip(rows.paths, states, strict=True):
            if state_of(source) != state:
                raise ValueError(f"{source} changed while it was being cleaned: start again when it is complete")

    atomic_write(path, write)


# --- the command line -------------------------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--in", dest="inputs", nargs="+", required=True, help="files of rows, in any format of training")
    add("--out", type=output_path, required=True, help="the file to write, .jsonl")
    add("--stage", default="auto", choices=["auto", "sft", "pretrain"], help="auto: by the keys of the first row")
    add("--near_dup", type=zero_or_one, default=0, help="1: drop near duplicates too; 256 bytes of memory per row")
    add("--near_threshold", type=fraction, default=0.8, help="similarity of near duplicates")
    add("--max_len", type=positive_int, default=None, help="tokens from which on a row is long")
    add("--long", default="drop", choices=["drop", "keep"], help="what a row of more than --max_len does")
    add("--against", nargs="+", default=[], help="evaluation files: rows that overlap with them are dropped")
    add("--ngram", type=positive_int, default=13, help="words or Han characters in a row that make an overlap")
    add("--tokenizer_path", default=str(ROOT / "model"), help="folder of the tokenizer, for --max_len")
    add("--report", default=None, type=output_path, help="also write what was done here, as JSON")
    add("--force", action="store_true", help="write over an older --out and --report")
    return parser.parse_args(argv)


def make_inspection(args: argparse.Namespace, paths: list[Path], against: list[Path]) -> Inspection:
    tokenizer = None
    if args.max_len:
        from transformers import AutoTokenizer  # takes seconds to import, so only where it is needed

        tokenizer = FrozenTokenizer(AutoTokenizer.from_pretrained(input_path(args.tokenizer_path)))
    if args.near_dup:
        Signer()  # says what is missing before anything is read
    overlap = read_overlap(against, args.ngram)
    stage = find_stage(paths) if args.stage == "auto" else args.stage
    return Inspection(stage, tokenizer, near=bool(args.near_dup), repair=True, overlap=overlap)


def show(args: argparse.Namespace, rows: Rows, kept: int, long: int, dropped: Account, mended: Account) -> None:
    print(f"[Clean] read {rows.total} rows of {len(rows.paths)} files")
    for name, account in (("repaired", mended), ("dropped", dropped)):
        print("\n".join([f"[Clean] {name}: {account.counts.total()}", *account.lines()]))
    if args.max_len and args.long == "keep":
        print(f"[Clean] longer than {args.max_len} tokens, kept: {long}")
    print(f"[Clean] kept {kept} of {rows.total} rows -> {args.out}")


def main(args: argparse.Namespace) -> None:
    paths, against = ([input_path(path) for path in given] for given in (args.inputs, args.against))
    for path, flag in ((args.out, "--out"), (args.report, "--report")):
        if path:
            refuse_taken(path, [*paths, *against], args.force, flag)
    if args.report and args.report == args.out:
        raise ValueError(f"--report and --out are both {args.out}: choose another name for one of them")
    states = [state_of(path) for path in paths]
    dropped, mended = Account(), Account()
    rows = inspect_files(paths, make_inspection(args, paths, against), dropped, mended)
    keep = rows.choose(args, dropped)
    kept = int(keep.sum())
    if not kept:
        raise ValueError(f"no row of {rows.total} is left, so nothing is written: {'; '.join(dropped.lines())}")
    long = int((rows.columns["length"][keep] > args.max_len).sum()) if args.max_len else 0
    write_rows(args.out, rows, keep, states)
    show(args, rows, kept, long, dropped, mended)
    if args.report:
        from model.weights import write_json

        files = {"in": list(map(str, paths)), "out": str(args.out), "read": rows.total, "kept": kept}
        write_json(args.report, files | {"repaired": mended.report(), "dropped": dropped.report()})


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    with friendly_errors():
        main(parse_args())
