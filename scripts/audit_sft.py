"""Measure a file of SFT rows: true lengths, what is cut, padding, code, languages, turns, duplicates, faulty rows.

All figures are of whole rows before any truncation, and the advice at the end follows from them. A sample is drawn by
--seed from all of the file. Memory stays flat: of each row a few numbers are kept.

    python scripts/audit_sft.py --data_path dataset/sft_mini_512.jsonl --max_len 340 --scan_samples 20000
    python scripts/audit_sft.py --data_path dataset/sample/sft.jsonl --scan_samples 0 --near_dup 1     # all rows
    python scripts/audit_sft.py --data_path dataset/sample/sft.jsonl --json out/audit.json --hist out/lengths.png

Near duplicates need datasketch (pip install -r requirements-data.txt), and 256 bytes per row.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from dataset.diagnosis import (
    LANGUAGES,
    Facts,
    Inspection,
    Signer,
    first_equal,
    first_similar,
    inspect_rows,
    joined_columns,
    refuse_taken,
)
from dataset.encode import FrozenTokenizer
from dataset.jsonl import RowReader, read_rows
from dataset.token_cache import worker_count
from trainer.arguments import (
    ROOT,
    data_source,
    fraction,
    friendly_errors,
    input_path,
    output_path,
    positive_int,
    whole_number,
    zero_or_one,
)

MAX_LENS = (256, 340, 512, 768, 1024, 2048)
CUT_AT_MOST, STEP = 0.01, 64  # share of rows that the recommended max_len may cut; it is a multiple of STEP
MUCH_CUT, MUCH_PADDING, MANY_DUPLICATES, MANY_EMPTY = 0.05, 0.3, 0.01, 0.05
LISTED = 1000  # lines and pairs that the report names
NEAR_FULL = 5


# --- reading ----------------------------------------------------------------------------------------------------------


def sampled(rows: Iterable[tuple[int, object]], size: int, seed: int, total: list[int]) -> Iterator[tuple[int, object]]:
    """`size` of the rows, each equally likely (Algorithm R, Vitter 1985), in the file's order; all of them for 0.

    `total[0]` counts the rows that were read.
    """
    chosen, rng = [], random.Random(seed)
    for number, row in enumerate(rows):
        total[0] += 1
        if not size:
            yield row
        elif number < size:
            chosen.append((number, row))
        elif (place := rng.randrange(number + 1)) < size:
            chosen[place] = number, row
    yield from (row for _, row in sorted(chosen, key=lambda item: item[0]))


def collect(reader: RowReader, inspection: Inspection, rows: Iterable, workers: int) -> tuple[list[Facts], list]:
    """The facts of all rows, and (line, reason) of the faulty ones; raises ValueError if there is no good row."""
    from tqdm import tqdm

    parts, faults = [], []
    looks = {"total": reader.size or None, "unit": "B", "unit_scale": True}
    batches = inspect_rows(rows, inspection, workers)
    with closing(batches), tqdm(desc="audit", disable=None, delay=2, leave=False, **looks) as bar:
        for facts in batches:
            parts.append(facts)
            reader.rows += len(facts.columns["line"])
            for _, line, reason in facts.bad:
                reader.reject(line, reason)
                faults.append((line, reason))
            bar.update(reader.position - bar.n)
    if not reader.rows:
        reader.finish()
    return parts, faults


# --- figures ----------------------------------------------------------------------------------------------------------


def recommended_length(lengths: np.ndarray) -> tuple[int, int]:
    """The smallest multiple of STEP that cuts at most CUT_AT_MOST of the rows, and the smallest number that does."""
    allowed = int(CUT_AT_MOST * len(lengths))
    exact = int(np.sort(lengths)[len(lengths) - 1 - allowed])
    return -(-exact // STEP) * STEP, exact


def padding(lengths: np.ndarray, max_len: int) -> dict:
    """Share of pads with a row for each conversation, and with packing; `lengths` of those that are trained on."""
    from dataset.packing import best_fit  # it imports torch: only where it is needed

    lengths = np.minimum(lengths, max_len)
    rows = int(best_fit(lengths, max_len).max(initial=-1)) + 1
    tokens = int(lengths.sum())
    shares = [1 - tokens / (count * max_len) if count else 0.0 for count in (len(lengths), rows)]
    return {"rows": len(lengths), "packed_rows": rows, "unpacked": shares[0], "packed": shares[1]}


def spread(values: np.ndarray) -> dict:
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "min": int(values.min()),
        "max": int(values.max()),
    }


def repeated(first: np.ndarray, lines: np.ndarray) -> dict:
    """How many rows repeat an earlier one, and the lines of some."""
    later = np.flatnonzero(first != np.arange(len(first)))
    pairs = [[int(lines[row]), int(lines[first[row]])] for row in later[:LISTED]]
    return {"count": len(later), "share": len(later) / len(first), "pairs": pairs}


def near_repeated(columns: dict[str, np.ndarray], first: np.ndarray, threshold: float) -> dict:
    """Rows that are similar to an earlier one, among those that repeat none exactly; shares are of all rows."""
    single = np.flatnonzero(first == np.arange(len(first)))
    similar = first_similar(columns["digests"][single], columns["signatures"][single], threshold)
    found = repeated(similar, columns["line"][single])
    return found | {"share": found["count"] / len(first), "threshold": threshold}


def count_faults(faults: list[tuple[int, str]]) -> dict[str, dict]:
    """For each kind of fault how many there are, some of their lines, and the first reason."""
    kinds: dict[str, dict] = {}
    for line, reason in faults:
        kind = kinds.setdefault(reason.split(":")[0], {"count": 0, "lines": [], "first": f"line {line}: {reason}"})
        kind["count"] += 1
        if len(kind["lines"]) < LISTED:
            kind["lines"].append(line)
    return dict(sorted(kinds.items(), key=lambda item: -item[1]["count"]))


def figures(parts: list[Facts], faults: list, args: argparse.Namespace, total: int) -> dict:
    """All that the audit finds; shares are of the rows without a fault."""
    reports = {max_len: sum((part.reports[max_len] for part in parts), Counter()) for max_len in args.max_lens}
    columns = joined_columns(parts)
    lengths, turns = columns["length"], columns["turns"]
    n, pads = len(lengths), np.maximum(args.max_len - lengths, 0)
    first = first_equal(columns["hash"])
    advised, exact = recommended_length(lengths)
    return {
        "data": args.data_path,
        "max_len": args.max_len,
        "rows": total,
        "scanned": n + len(faults),
        "good": n,
        "seed": args.seed,
        "code": int(columns["code"].sum()),
        "python": int(columns["python"].sum()),
        "pads": spread(pads) | {"none": int((pads == 0).sum()), "near_full": int((pads <= NEAR_FULL).sum())},
        "labeled": spread(columns["trained"]) | {"zero": int((columns["trained"] == 0).sum())},
        "lengths": spread(lengths) | {f"p{p}": int(np.percentile(lengths, p, method="higher")) for p in (90, 95, 99)},
        "truncated": {max_len: int((lengths > max_len).sum()) for max_len in args.max_lens},
        "replies": {max_len: _replies(report) for max_len, report in reports.items()},
        "recommended": {"max_len": advised, "exact": exact},
        "padding": padding(lengths[columns["trained"] > 0], args.max_len),
        "languages": {name: int((columns["language"] == i).sum()) for i, name in enumerate(LANGUAGES)},
        "turns": spread(turns) | {"several": int((turns > 1).sum()), "system": int(columns["system"].sum())},
        "duplicates": repeated(first, columns["line"]),
        "near_duplicates": near_repeated(columns, first, args.near_threshold) if args.near_dup else None,
        "faults": count_faults(faults),
        "histogram": np.unique(lengths, return_counts=True),
    }


def _replies(report: Counter) -> dict:
    return {name: report[name] for name in ("replies_cut", "replies_lost", "dropped")}


# --- what is said -----------------------------------------------------------------------------------------------------


def share(count: int, of: int) -> str:
    return f"{count} ({count / of:.2%})"


def report_lines(found: dict) -> list[str]:
    n, max_len = found["good"], found["max_len"]
    pads, labels, lengths, turns = found["pads"], found["labeled"], found["lengths"], found["turns"]
    replies, pad = found["replies"][max_len], found["padding"]
    advised = found["recommended"]
    spread_of = "mean={mean:.1f} median={median:.1f} min={min} max={max}".format
    lines = [
        f"data={found['data']} max_len={max_len} scanned={found['scanned']}/{found['rows']}",
        f"code-like samples: {share(found['code'], n)}",
        f"mention 'python': {share(found['python'], n)}",
        f"pad_count {spread_of(**pads)}",
        f"sequences fully packed (pad=0): {share(pads['none'], n)}",
        f"sequences near full (pad<=5): {share(pads['near_full'], n)}",
        f"labeled_tokens {spread_of(**labels)}",
        f"zero_labeled_samples: {share(labels['zero'], n)}",
        f"true lengths {spread_of(**lengths)} p90={lengths['p90']} p95={lengths['p95']} p99={lengths['p99']}",
        "truncated at " + ", ".join(f"{size}: {share(count, n)}" for size, count in found["truncated"].items()),
        f"at max_len={max_len}: {replies['replies_cut']} replies lose their end, {replies['replies_lost']} are lost, "
        f"{replies['dropped']} rows have no reply left",
        f"recommended max_len={advised['max_len']}: the smallest multiple of {STEP} that cuts at most "
        f"{CUT_AT_MOST:.0%} of the rows ({advised['exact']} tokens would do)",
        f"padding at max_len={max_len}: {pad['unpacked']:.1%} with a row each, {pad['packed']:.1%} packed "
        f"({pad['rows']} -> {pad['packed_rows']} rows)",
        "languages by script: " + ", ".join(f"{name} {share(count, n)}" for name, count in found["languages"].items()),
        f"turns (replies per row) {spread_of(**turns)}; several: {share(turns['several'], n)}, "
        f"with a system prompt: {share(turns['system'], n)}",
    ]
    return [f"[Audit] {line}" for line in lines + duplicate_lines(found) + fault_lines(found["faults"])]


def duplicate_lines(found: dict) -> list[str]:
    n, near = found["good"], found["near_duplicates"]
    lines = [f"exact duplicates: {share(found['duplicates']['count'], n)}{_pairs(found['duplicates'])}"]
    if near is None:
        lines.append("near duplicates: not looked for (--near_dup 1)")
    else:
        lines.append(f"near duplicates (similarity >= {near['threshold']:g}): {share(near['count'], n)}{_pairs(near)}")
    if found["scanned"] < found["rows"]:
        lines.append("both among the scanned rows only: there are more of them in all rows (--scan_samples 0)")
    return lines


def _pairs(found: dict) -> str:
    some = ", ".join(f"line {one} of {other}" for one, other in found["pairs"][:3])
    return f", such as {some}" if some else ""


def fault_lines(faults: dict[str, dict]) -> list[str]:
    lines = [f"faulty rows: {sum(kind['count'] for kind in faults.values())}"]
    for name, kind in faults.items():
        dots = ", ..." if kind["count"] > 5 else ""
        lines.append(f"  {name}: {kind['count']}, at line {', '.join(map(str, kind['lines'][:5]))}{dots}")
        lines.append(f"    {kind['first']}")
    return lines


def advice(found: dict) -> list[str]:
    """What to do, from the figures above."""
    n, max_len, advised = found["good"], found["max_len"], found["recommended"]["max_len"]
    cut, code = found["truncated"][max_len] / n, found["code"] / n
    lines = []
    if cut > MUCH_CUT:
        lines.append(
            f"⚠️  截断比例看起来不低（{cut:.1%} 的样本超过 max_len={max_len}），建议把 SFT max_seq_len 提到 {advised}。"
        )
    else:
        more = f"（提到 {advised} 可以降到 {CUT_AT_MOST:.0%} 以内）" if cut > CUT_AT_MOST else ""
        lines.append(f"✅  截断比例不算高（{cut:.1%}），max_seq_len={max_len} 可以接受{more}。")
    if found["labeled"]["zero"] > MANY_EMPTY * n:
        lines.append(f"⚠️  {found['labeled']['zero'] / n:.1%} 的样本在 max_len={max_len} 内没有回复，训练时会被丢弃。")
    if code < 0.01:
        lines.append(f"⚠️  代码样本占比 <1%（{code:.2%}），模型不会写代码很正常：建议补充代码类 SFT 数据。")
    elif code < 0.05:
        lines.append(f"⚠️  代码样本占比偏低（{code:.2%} <5%）：建议补充一些代码类 SFT 数据并用更长 seq 训一轮。")
    else:
        why = " seq_len 截断或训练策略/LR 问题" if cut > MUCH_CUT else "训练策略/LR 或解码方式问题，而不是截断"
        lines.append(f"✅  代码样本占比不算太低（{code:.1%}）：不会写代码更可能是{why}。")
    pad = found["padding"]
    if pad["unpacked"] > MUCH_PADDING:
        kept = f"{pad['rows']} 行可装进 {pad['packed_rows']} 行"
        lines.append(f"✅  不打包时 {pad['unpacked']:.0%} 是 padding：用 --packing 1（默认），{kept}。")
    copies = found["duplicates"]["count"] + (found["near_duplicates"] or {"count": 0})["count"]
    if copies > MANY_DUPLICATES * n or found["faults"]:
        flag = " --near_dup 1" if found["near_duplicates"] else ""
        wrong = sum(kind["count"] for kind in found["faults"].values())
        lines.append(
            f"⚠️  重复样本 {copies} 条、有问题的样本 {wrong} 条：先用 scripts/clean_data.py --in {found['data']} "
            f"--out <文件>{flag} 清洗。"
        )
    return lines


def draw(path: Path, found: dict) -> None:
    """The histogram of the true lengths, the longest 1 % left out, as PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("matplotlib is not installed: pip install matplotlib, or leave --hist out") from error
    from model.weights import atomic_write

    lengths, counts = found["histogram"]
    right = max(found["lengths"]["p99"], found["max_len"]) * 1.05
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(lengths, bins=np.linspace(0, right, 80), weights=counts, color="#2f6db3")
    marks = (("max_len", found["max_len"], "#d1495b"), ("recommended", found["recommended"]["max_len"], "#5a9e5a"))
    for name, at, colour in marks:
        axes.axvline(at, color=colour, label=f"{name} {at}")
    axes.set(xlabel="tokens of a row, not cut", ylabel="rows", xlim=(0, right))
    axes.legend()
    atomic_write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


# --- the command line -------------------------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data_path", default=str(ROOT / "dataset" / "sft_mini_512.jsonl"), help="rows, in any format of SFT")
    add("--max_len", type=positive_int, default=340, help="tokens per row, as --max_seq_len of training")
    add("--scan_samples", type=whole_number, default=20000, help="rows that are drawn from all; 0: all of them")
    add("--seed", type=int, default=42, help="of the draw")
    add("--near_dup", type=zero_or_one, default=0, help="1: also look for near duplicates, 256 bytes per row")
    add("--near_threshold", type=fraction, default=0.8, help="similarity of near duplicates")
    add("--tokenizer_path", default=str(ROOT / "model"), help="folder of the tokenizer")
    add("--json", default=None, type=output_path, help="also write all figures here")
    add("--hist", default=None, type=output_path, help="also draw the lengths here, as PNG")
    add("--force", action="store_true", help="write over an older --json and --hist")
    for name, kind in (("weight", str), ("device", str), ("hidden_size", int), ("num_hidden_layers", int)):
        add(f"--{name}", type=kind, default=None, help="accepted; the tokenizer is enough")
    add("--use_moe", type=zero_or_one, default=None, help="accepted; the tokenizer is enough")
    args = parser.parse_args(argv)
    args.max_lens = (args.max_len, *(size for size in MAX_LENS if size != args.max_len))
    return args


def main(args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer  # takes seconds to import: not for --help

    source = data_source(args.data_path)
    for path, flag in ((args.json, "--json"), (args.hist, "--hist")):
        if path:
            refuse_taken(path, [source], args.force, flag)
    reader = read_rows(source, "skip")
    if args.near_dup:
        Signer()  # says what is missing before anything is read
    tokenizer = FrozenTokenizer(AutoTokenizer.from_pretrained(input_path(args.tokenizer_path)))
    total = [0]
    rows = sampled(reader.raw, args.scan_samples, args.seed, total)
    inspection = Inspection("sft", tokenizer, args.max_lens, near=bool(args.near_dup))
    parts, faults = collect(reader, inspection, rows, worker_count(source))
    found = figures(parts, faults, args, total[0])
    found["truncated"] = dict(sorted(found["truncated"].items()))
    print("\n".join(report_lines(found)))
    print("\n[Suggestion]")
    print("\n".join(advice(found)))
    if args.hist:
        draw(args.hist, found)
    if args.json:
        from model.weights import write_json  # takes a second to import, so only where it is needed

        lengths, counts = (column.tolist() for column in found["histogram"])
        write_json(args.json, found | {"histogram": {"length": lengths, "rows": counts}})


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    with friendly_errors():
        main(parse_args())
