"""Train a byte-level BPE tokenizer on text of your own and write it as a folder that AutoTokenizer loads.

A tokenizer and the weights trained with it belong together, so an existing one is never replaced without --force.
Training is deterministic: the same files in the same order give the same tokenizer.json, byte for byte. Documents whose
hash says so (--holdout) are kept out of training, and the compression is measured on them.

    python scripts/train_tokenizer.py --sample_only --out_dir out/my_tokenizer
    python scripts/train_tokenizer.py --data dataset/zh.jsonl:2 dataset/en.jsonl --out_dir out/my_tokenizer

FILE:2 counts every document of the file twice, FILE:0.5 every second one; the held-back documents always count once.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.arguments import ROOT, SAMPLE_DIR, input_path, output_path

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# part of a reply, so not "special": they stay visible when special tokens are skipped in decoding
TAGS = tuple(f"<{slash}{name}>" for name in ("think", "answer", "tool_call", "tool_response") for slash in ("", "/"))
RESERVED = tuple(f"<|reserved_{index}|>" for index in range(9))
# words of every rendered turn that no row of data holds; learned once per document, so they become single tokens
HEADERS = "system\nuser\nassistant\n"
FENCED = re.compile(r"```.*?```", re.DOTALL)
CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
LATIN_WORD = re.compile("[A-Za-z]+")
CONTROL = SPECIAL + TAGS + RESERVED
MIN_VOCAB = 256 + len(CONTROL)
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# "PreTrainedTokenizerFast" is the one class name that transformers 4.x and 5.x load with the same token ids
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": 32768,
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "add_bos_token": False,
    "add_eos_token": False,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "padding_side": "right",
    "truncation_side": "right",
}


class Source(NamedTuple):
    path: Path
    weight: float


# files of the sample data on which models are judged, by the ends of their names
JUDGED = ("_val", "_eval", "prompts", "_questions")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="FILE[:WEIGHT]", help=".jsonl, .jsonl.gz or .txt files"
    )
    parser.add_argument("--sample_only", action="store_true", help="train on dataset/sample/*.jsonl alone")
    parser.add_argument("--out_dir", required=True, help="folder to write to")
    parser.add_argument("--force", action="store_true", help="replace a tokenizer that is in --out_dir")
    parser.add_argument("--vocab_size", type=int, default=6400)
    parser.add_argument("--min_frequency", type=int, default=2, help="a pair seen less often is not merged")
    parser.add_argument("--max_token_length", type=int, default=24, help="in bytes; a Chinese character has three")
    parser.add_argument("--holdout", type=float, default=0.05, help="share of documents to measure on, not to train on")
    parser.add_argument(
        "--template", default=str(ROOT / "model" / "chat_template.jinja"), help="chat template to put in"
    )
    args = parser.parse_args(argv)
    if bool(args.data) == args.sample_only:
        raise ValueError("name the text to train on: either --data FILE ... or --sample_only")
    if args.vocab_size < MIN_VOCAB:
        raise ValueError(f"--vocab_size {args.vocab_size} is too small: bytes and control tokens need {MIN_VOCAB}")
    if not 0 <= args.holdout < 1:
        raise ValueError(f"--holdout {args.holdout} is not a share: give a number from 0 to below 1, such as 0.05")
    return args


def parse_source(text: str) -> Source:
    """Read FILE or FILE:WEIGHT; a colon that no number follows belongs to the path (C:\\data.jsonl)."""
    path, _, weight = text.rpartition(":")
    try:
        source = Source(Path(path), float(weight)) if path else Source(Path(text), 1.0)
    except ValueError:
        source = Source(Path(text), 1.0)
    if not 0 < source.weight < 1000:
        raise ValueError(f"the weight of {text} is {source.weight}: give a number above 0, such as 2 or 0.5")
    return source._replace(path=input_path(source.path))


def sample_files() -> list[str]:
    """The training files of the sample data; what models are judged on stays unseen here as well."""
    paths = sorted(p for p in SAMPLE_DIR.glob("*.jsonl") if not p.stem.endswith(JUDGED))
    if not paths:
        raise FileNotFoundError(f"no sample data in {SAMPLE_DIR}: run scripts/generate_sample_data.py first")
    return [str(path) for path in paths]


def read_documents(path: Path) -> Iterator[str]:
    """Yield one text per row (or, of a .txt file, per line) without reading the file as a whole.

    Raises:
        ValueError: a row that is not JSON or holds no text, named by file and line.
    """
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    plain = path.name.removesuffix(".gz").endswith(".txt")
    with opened as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = line.rstrip("\n") if plain else row_text(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}:{number}: no row of text, conversations or input/output: {error!r}"
                ) from error
            if text:
                yield text


def row_text(row: dict) -> str:
    """The text of a row of pretraining, chat or input/output data, as one document."""
    if "conversations" not in row:
        return row["text"] if "text" in row else f"{row['input']}\n{row['output']}"
    parts = []
    for message in row["conversations"]:
        for key in ("content", "reasoning_content", "tools", "tool_calls"):
            value = message.get(key)
            if value:
                parts.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return "\n".join(parts)


def unit_hash(text: str, salt: bytes = b"") -> float:
    """A number in [0, 1) that depends on the text alone: the same document falls to the same side everywhere."""
    return int.from_bytes(blake2b(text.encode("utf-8"), digest_size=8, salt=salt).digest(), "big") / 2**64


def is_held_back(text: str, share: float) -> bool:
    return unit_hash(text) < share


def training_texts(sources: list[Source], holdout: float) -> Iterator[str]:
    """Yield the documents that are not held back, each as often as its file's weight says, and turn headers."""
    for source in sources:
        whole = int(source.weight)
        for text in read_documents(source.path):
            if not is_held_back(text, holdout):
                copies = whole + (unit_hash(text, b"weight") < source.weight - whole)
                yield from [text, HEADERS] * copies


def train(texts: Iterator[str], vocab_size: int, min_frequency: int = 2, max_token_length: int = 24) -> Tokenizer:
    """Train a byte-level BPE whose first ids are CONTROL, in order.

    The pre-tokenizer is GPT-2's own, because GGUF knows it by name ("gpt-2") and splits the same way.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        max_token_length=max_token_length,
        special_tokens=[AddedToken(text, special=text not in TAGS, normalized=False) for text in CONTROL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the text gives only {tokenizer.get_vocab_size()} entries of {vocab_size}: train on more text, "
            "or pass a smaller --vocab_size or --min_frequency 1"
        )
    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:  # the trainer marks all of its special_tokens as special
        token["special"] = token["content"] not in TAGS
    return Tokenizer.from_str(json.dumps(data))


def language(text: str) -> str:
    """What a document is counted under: code if half of it is fenced, else zh or en.

    It is Chinese if it has more Chinese characters than Latin words: comparing characters with letters would call a
    Chinese text that names a few commands English.
    """
    if 2 * sum(map(len, FENCED.findall(text))) > len(text):
        return "code"
    return "zh" if len(CHINESE.findall(text)) > len(LATIN_WORD.findall(text)) else "en"


def measure(tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    """Characters per token: all characters of the texts over all of their tokens (pooled, not a mean of ratios)."""
    characters = sum(map(len, texts))
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))
    return {"documents": len(texts), "characters": characters, "tokens": tokens, "ratio": characters / max(tokens, 1)}


def report_compression(tokenizer: Tokenizer, sources: list[Source], holdout: float) -> None:
    """Print characters per token on the held-back documents, per file and language, then pooled per language."""
    pooled: dict[str, list[str]] = {}
    print(f"held back: {'file':32} language  documents  characters     tokens  characters per token")
    for source in sources:
        groups: dict[str, list[str]] = {}
        for text in read_documents(source.path):
            if is_held_back(text, holdout):
                groups.setdefault(language(text), []).append(text)
        for name, texts in sorted(groups.items()):
            pooled.setdefault(name, []).extend(texts)
            print_measure(source.path.name, name, measure(tokenizer, texts))
    for name, texts in sorted(pooled.items()):
        print_measure("all files", name, measure(tokenizer, texts))


def print_measure(label: str, name: str, row: dict[str, float]) -> None:
    counts = f"{row['documents']:>9}  {row['characters']:>10}  {row['tokens']:>9}"
    print(f"           {label:32} {name:8}  {counts}  {row['ratio']:>20.3f}")


def check_round_trip(tokenizer: Tokenizer, count: int = 2000, seed: int = 42) -> None:
    """Encode and decode random Unicode strings from all planes; raises AssertionError on the first that changes."""
    rng = random.Random(seed)
    ranges = ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF))
    for _ in range(count):
        text = "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 40)))
        decoded = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        assert decoded == text, f"encoding and decoding turned {text!r} into {decoded!r}"
    print(f"round trip: {count} random Unicode strings come back unchanged")


def refuse_to_replace(out_dir: Path, force: bool) -> None:
    present = [name for name in FILES[:2] if (out_dir / name).exists()]
    if present and not force:
        raise FileExistsError(
            f"{out_dir} holds a tokenizer already ({', '.join(present)}): weights trained with it would no longer fit. "
            "Name another --out_dir, or pass --force to replace it"
        )


def write(tokenizer: Tokenizer, out_dir: Path, template: str) -> None:
    """Write FILES to out_dir: all to temporary names first, then each renamed, so that none is ever half written."""
    out_dir.mkdir(parents=True, exist_ok=True)
    contents = (tokenizer.to_str(pretty=True), json.dumps(TOKENIZER_CONFIG, indent=2), template)
    for name, content in zip(FILES, contents, strict=True):
        (out_dir / f"{name}.tmp").write_text(content.rstrip("\n") + "\n", encoding="utf-8", newline="\n")
    for name in FILES:
        os.replace(out_dir / f"{name}.tmp", out_dir / name)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    out_dir = output_path(args.out_dir)
    refuse_to_replace(out_dir, args.force)
    template = input_path(args.template).read_text(encoding="utf-8")
    sources = [parse_source(name) for name in (sample_files() if args.sample_only else args.data)]
    start = time.monotonic()
    tokenizer = train(training_texts(sources, args.holdout), args.vocab_size, args.min_frequency, args.max_token_length)
    print(f"trained {tokenizer.get_vocab_size()} entries in {time.monotonic() - start:.0f} s")
    report_compression(tokenizer, sources, args.holdout)
    check_round_trip(tokenizer)
    write(tokenizer, out_dir, template)
    print(f"wrote {', '.join(FILES)} to {out_dir}\nuse it: --tokenizer_path {args.out_dir}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
