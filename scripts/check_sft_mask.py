"""Show which tokens of a data file are trained, and check that these are the assistant's replies and nothing else.

Needs the tokenizer alone, no weights, and says the same every time. The labels are those that training uses; where the
replies are is found a second time without them, by rendering each row up to every reply.

    python scripts/check_sft_mask.py --data_path dataset/sft_mini_512.jsonl --max_len 340 --scan_samples 2000
    python scripts/check_sft_mask.py --data_path dataset/sample/sft.jsonl --strict         # exit status 1 if it is bad
    python scripts/check_sft_mask.py --data_path dataset/sample/sft.jsonl --show_index 7 --html out/mask.html
    python scripts/check_sft_mask.py --data_path dataset/sample/pretrain.jsonl             # texts of pretraining, too
"""

import argparse
import html
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from dataset.diagnosis import refuse_taken, reply_spans, stage_of
from dataset.encode import FrozenTokenizer, PretrainRecipe, SFTRecipe, cut_rows, split_rows
from dataset.jsonl import BadRow, RowReader, read_rows, to_object
from model.chat import render
from trainer.arguments import ROOT, data_source, friendly_errors, input_path, output_path, positive_int, zero_or_one

CAUSES = ("fine", "reply cut", "no reply left", "mask outside replies", "reply not trained")
MOST_ZERO = 0.05  # share of rows without a label from which on the mask is bad
BEFORE_REPLY = 20  # tokens of the prompt in the token view
GREEN, PLAIN = "\033[32m", "\033[0m"
# characters that a page would obey or hide: control characters, and those that turn the direction of text
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Trained tokens</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ccc; padding: 1em; }}
mark {{ background: #bfe8c5; }} mark.wrong {{ background: #f3b0ab; }} .stats {{ border: 0; padding: 0; }}
</style></head><body>
<h1>Trained tokens</h1>
<p><mark>trained</mark> <mark class="wrong">trained, but outside a reply</mark> and not trained.</p>
<pre class="stats">{stats}</pre>
{rows}
</body></html>
"""


@dataclass
class Checked:
    """A row of the file as it is trained: ids int64, trained and allowed (by the second look) bool, [N] each."""

    whole: list[int]  # ids, not cut
    ids: np.ndarray
    trained: np.ndarray
    allowed: np.ndarray
    replies_cut: int = 0
    replies_lost: int = 0

    @property
    def outside(self) -> int:
        return int((self.trained & ~self.allowed).sum())

    @property
    def missing(self) -> int:
        return int((self.allowed & ~self.trained).sum())

    @property
    def cause(self) -> str:
        if self.outside:
            return "mask outside replies"
        if self.missing:
            return "reply not trained"
        if not self.trained.any():
            return "no reply left"
        return "reply cut" if self.replies_cut or self.replies_lost else "fine"


@dataclass
class Statistics:
    """What the scanned rows add up to; `rows` counts those of the file."""

    rows: int = 0
    labels: list[int] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    causes: Counter = field(default_factory=Counter)

    def add(self, row: Checked) -> None:
        self.labels.append(int(row.trained.sum()))
        self.causes[row.cause] += 1
        self.counts["outside"] += row.outside
        self.counts["missing"] += row.missing
        self.counts["replies_cut"] += row.replies_cut
        self.counts["replies_lost"] += row.replies_lost

    @property
    def zero(self) -> int:
        return self.labels.count(0)

    @property
    def is_bad(self) -> bool:
        wrong = self.counts["outside"] or self.counts["missing"]
        return bool(wrong) or self.zero > MOST_ZERO * len(self.labels)

    def lines(self, path: str, max_len: int) -> list[str]:
        labels, scanned, counts = self.labels, len(self.labels), self.counts
        causes = (f"{cause} {self.causes[cause]} ({self.causes[cause] / scanned:.2%})" for cause in CAUSES)
        return [
            f"[Stats] dataset={path}, max_len={max_len}, scanned={scanned}/{self.rows}",
            f"[Stats] labeled_tokens: mean={statistics.mean(labels):.1f}, median={statistics.median(labels):.1f}, "
            f"min={min(labels)}, max={max(labels)}",
            f"[Stats] zero_labeled_samples: {self.zero} ({self.zero / scanned:.2%})",
            f"[Stats] labeled_outside_replies: {counts['outside']} tokens, "
            f"reply tokens without a label: {counts['missing']}",
            f"[Stats] replies_cut: {counts['replies_cut']} lost their end marker, {counts['replies_lost']} lost whole",
            f"[Stats] rows: {', '.join(causes)}",
        ]


# --- rows -------------------------------------------------------------------------------------------------------------


def check_conversation(tokenizer: FrozenTokenizer, row: dict, max_len: int) -> Checked:
    """A row of fine-tuning, encoded and cut by the very code that training runs."""
    recipe = SFTRecipe()
    encoded = recipe.encode(tokenizer, [(0, recipe.read(row))], "")
    layout, size = cut_rows(encoded, max_len), min(len(encoded.ids), max_len)
    trained = layout.take([0])[1] if len(layout) else np.zeros(size, bool)
    allowed = np.zeros(size, bool)
    for start, end in reply_spans(tokenizer, recipe.read(row), stop=max_len):
        allowed[start:end] = True
    allowed[0] = False  # nothing comes before it
    cut, lost = layout.report["replies_cut"], layout.report["replies_lost"]
    return Checked(encoded.ids.tolist(), encoded.ids[:size].astype(np.int64), trained, allowed, cut, lost)


def check_text(tokenizer: FrozenTokenizer, row: dict, max_len: int) -> Checked:
    """A row of pretraining: all of it is trained but BOS, and the token that a part shares with the one before."""
    recipe = PretrainRecipe()
    encoded = recipe.encode(tokenizer, [(0, recipe.read(row))], "")
    layout = split_rows(encoded, max_len)
    ids, trained, lengths = layout.take(np.arange(len(layout)))
    allowed = ids != tokenizer.bos_token_id
    allowed[np.cumsum(lengths) - lengths] = False
    return Checked(encoded.ids.tolist(), ids, trained, allowed)


def check_row(tokenizer: FrozenTokenizer, raw: object, stage: str, max_len: int) -> Checked:
    check = check_conversation if stage == "sft" else check_text
    return check(tokenizer, to_object(raw), max_len)


def scan(reader: RowReader, tokenizer: FrozenTokenizer, args: argparse.Namespace) -> Statistics:
    """The first --scan_samples rows of the file; the others are only counted."""
    found = Statistics()
    for line, raw in reader.raw:
        found.rows += 1
        if found.rows > args.scan_samples:
            continue
        try:
            if args.stage == "auto":
                args.stage = stage_of(to_object(raw))
            found.add(check_row(tokenizer, raw, args.stage, args.max_len))
        except ValueError as error:
            reader.reject(line, str(error))
            continue
        reader.rows += 1
    reader.finish()
    return found


def checked_from(
    path: str, tokenizer: FrozenTokenizer, args: argparse.Namespace, index: int, count: int
) -> Iterator[tuple[int, Checked]]:
    """(index, row) of the first `count` rows from one on; bad ones are passed over where they may be."""
    for number, (line, raw) in enumerate(read_rows(path).raw):
        if number < index:
            continue
        if count == 0:
            return
        try:
            row = check_row(tokenizer, raw, args.stage, args.max_len)
        except ValueError as error:
            if args.on_bad_row == "skip":
                continue
            raise BadRow(path, line, str(error)) from error
        yield number, row
        count -= 1


# --- what is shown ----------------------------------------------------------------------------------------------------


def marker_ids(tokenizer: FrozenTokenizer, stage: str) -> tuple[list[int], list[int]]:
    """Ids of the header of a reply and of what ends it; of a text, BOS and EOS."""
    if stage == "pretrain":
        return [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    hello = [{"role": "user", "content": "?"}]
    ids = render(tokenizer, hello).input_ids
    header = render(tokenizer, hello, add_generation_prompt=True).input_ids[len(ids) :]
    return header, ids[len(ids) - 1 - ids[::-1].index(tokenizer.eos_token_id) :]


def positions_of(wanted: list[int], ids: list[int]) -> str:
    """Where a list of ids begins in another, the first ten places."""
    found = [i for i in range(len(ids) - len(wanted) + 1) if ids[i : i + len(wanted)] == wanted]
    return f"[{', '.join(map(str, found[:10]))}{', ...' if len(found) > 10 else ''}]"


def show_sample(tokenizer: FrozenTokenizer, row: Checked, index: int, args: argparse.Namespace) -> None:
    ids, labelled = row.ids.tolist(), np.flatnonzero(row.trained)
    first, last = (int(labelled[0]), int(labelled[-1])) if len(labelled) else (None, None)
    print("=" * 80)
    print(f"[Sample {index}] raw prompt (first 800 chars):")
    print(visible(tokenizer.decode(row.whole)[:800]))
    print("[Marker Tokens]")
    bos, eos = marker_ids(tokenizer, args.stage)
    print(f"bos_id: {bos} decoded: {tokenizer.decode(bos)!r}")
    print(f"eos_id: {eos} decoded: {tokenizer.decode(eos)!r}")
    print("[Marker Positions]")
    print(f"bos positions: {positions_of(bos, ids)}")
    print(f"eos positions: {positions_of(eos, ids)}")
    print(f"[Labeled Tokens] count={len(labelled)}")
    print(f"first labeled idx={first}, last labeled idx={last}")
    print("[Token-level view] (L = participates in loss)")
    start = max((first or 0) - BEFORE_REPLY, 0)
    for i in range(start, min(start + args.show_tokens, len(ids))):
        mark = "L" if row.trained[i] else " "
        line = f"{i:4d} {mark} id={ids[i]:5d} tok={tokenizer.decode([ids[i]])!r}"
        print(f"{GREEN}{line}{PLAIN}" if row.trained[i] and coloured() else line)


def coloured() -> bool:
    """Whether stdout is a terminal whose user has nothing against colours (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def visible(text: str) -> str:
    """Control characters of the data written out: a terminal would obey them and a page would hide them."""
    return INVISIBLE.sub(
        lambda found: f"\\x{ord(found[0]):02x}" if ord(found[0]) < 256 else ascii(found[0])[1:-1], text
    )


def show_conclusion(found: Statistics, stage: str) -> None:
    print("[Conclusion]")
    if found.counts["outside"]:
        print(f"❌  有 {found.counts['outside']} 个被训练的 token 不在 assistant 回复内：mask 错误，必须修。")
    if found.counts["missing"]:
        print(f"❌  assistant 回复里有 {found.counts['missing']} 个 token 没有 label：mask 不完整，必须修。")
    if found.zero > MOST_ZERO * len(found.labels):
        print("⚠️  有较多样本 labels 全为 -100：很可能 bos_id/eos_id 与 chat_template 不匹配，需要修。")
        if found.causes["no reply left"] > MOST_ZERO * len(found.labels):
            print("    这些样本的提示词超过 max_len，回复被完全截掉：提高 --max_len / --max_seq_len，或缩短提示词。")
    elif not found.is_bad:
        what = "SFT 至少在训练 assistant 段落" if stage == "sft" else "每个 token 都在训练"
        print(f"✅  labels 覆盖看起来正常：{what}。")


# --- the page ---------------------------------------------------------------------------------------------------------


def as_html(tokenizer: FrozenTokenizer, row: Checked, index: int) -> str:
    """A row as markup, every character of the data escaped; tokens of one kind are decoded together."""
    kinds = zip(row.ids.tolist(), row.trained.tolist(), row.allowed.tolist(), strict=True)
    parts = []
    for (trained, allowed), run in groupby(kinds, key=lambda token: (token[1], token[1] and token[2])):
        text = tokenizer.decode([token[0] for token in run])
        text = html.escape(visible(text.encode("utf-8", "backslashreplace").decode()))
        wrong = "" if allowed else ' class="wrong"'
        parts.append(f"<mark{wrong}>{text}</mark>" if trained else text)
    return f"<h2>Sample {index}: {row.cause}</h2>\n<pre>{''.join(parts)}</pre>"


def write_page(path: Path, tokenizer: FrozenTokenizer, source: str, index: int, stats: list[str], args) -> None:
    from model.weights import atomic_write  # takes a second to import, so only where it is needed

    rows = [
        as_html(tokenizer, row, number) for number, row in checked_from(source, tokenizer, args, index, args.html_rows)
    ]
    page = PAGE.format(stats=html.escape(visible("\n".join(stats))), rows="\n".join(rows))
    atomic_write(path, lambda temporary: Path(temporary).write_text(page, encoding="utf-8", newline="\n"))
    print(f"[HTML] {len(rows)} rows -> {path}")


# --- the command line -------------------------------------------------------------------------------------------------


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data_path", default=str(ROOT / "dataset" / "sft_mini_512.jsonl"), help="rows, in any format of training")
    add("--max_len", type=positive_int, default=340, help="tokens per row, as --max_seq_len of training")
    add("--scan_samples", type=int, default=2000, help="rows that the statistics are of, from the first on")
    add("--show_index", type=int, default=0, help="the row that is shown, from 0; counted round the end of the file")
    add("--show_tokens", type=int, default=220, help="tokens of it in the token view")
    add("--stage", default="auto", choices=["auto", "sft", "pretrain"], help="auto: by the keys of the first row")
    add("--tokenizer_path", default=str(ROOT / "model"), help="folder of the tokenizer")
    add("--on_bad_row", default="raise", choices=["raise", "skip"], help="what a row that cannot be used does")
    add("--strict", action="store_true", help="exit status 1 on a bad mask, or if over 5%% of the rows have no label")
    add("--html", default=None, type=output_path, help="also write a page on which trained tokens are marked")
    add("--html_rows", type=positive_int, default=20, help="rows on that page, from --show_index on")
    add("--force", action="store_true", help="write over an older --html")
    add_unused_flags(parser)
    args = parser.parse_args(argv)
    if args.scan_samples < 1:
        parser.error(f"--scan_samples is {args.scan_samples}: at least one row must be looked at")
    return args


def add_unused_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the design document's script, which loaded a model to get at the tokenizer."""
    for name, kind in (("weight", str), ("device", str), ("hidden_size", int), ("num_hidden_layers", int)):
        parser.add_argument(f"--{name}", type=kind, default=None, help="accepted; the tokenizer is enough")
    parser.add_argument("--use_moe", type=zero_or_one, default=None, help="accepted; the tokenizer is enough")


def main(args: argparse.Namespace) -> int:
    from transformers import AutoTokenizer  # takes seconds to import: not for --help

    source = data_source(args.data_path)
    if args.html:
        refuse_taken(args.html, [source], args.force, "--html")
    reader = read_rows(source, args.on_bad_row)
    tokenizer = FrozenTokenizer(AutoTokenizer.from_pretrained(input_path(args.tokenizer_path)))
    found = scan(reader, tokenizer, args)
    stats = found.lines(args.data_path, args.max_len)
    print("\n".join(stats))
    index = args.show_index % found.rows
    for number, row in checked_from(source, tokenizer, args, index, 1):
        show_sample(tokenizer, row, number, args)
    if args.html:
        write_page(args.html, tokenizer, source, index, stats, args)
    show_conclusion(found, args.stage)
    return int(args.strict and found.is_bad)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    with friendly_errors():
        sys.exit(main(parse_args()))
