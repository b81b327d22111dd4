"""Write the sample data of dataset/sample: small, true, bilingual texts for every stage of training.

Everything is made from the tables and sentence patterns in scripts/sample_data by one seeded random generator, so that
the same seed gives the same bytes on every machine and a test can compare the committed files with a fresh run.

    python scripts/generate_sample_data.py
    python scripts/generate_sample_data.py --out_dir /tmp/sample --seed 7
"""

import argparse
import json
import os
import sys
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.sample_data import chat, code, lore, nature, numbers, regression, tales, topics, world
from scripts.sample_data.writing import tidy

PRETRAIN_BYTES = {"zh": 1_800_000, "en": 1_020_000}
VAL_EVERY = 34  # every 34th pretraining row is held back: about 80 KB
MAX_BYTES = 3_900_000
MODULES = (world, nature, lore, topics, numbers, tales, code)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out_dir", default=str(ROOT / "dataset" / "sample"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=42, help="another seed draws other texts from the same tables")
    return parser.parse_args()


def pretrain_texts(seed: int, lang: str) -> list[str]:
    """Different texts of one language; every kind gets its share of the bytes."""
    kinds = [kind for module in MODULES for kind in module.KINDS]
    whole = sum(kind[3] for kind in kinds)
    seen: dict[str, None] = {}
    for name, write, subjects, share in kinds:
        rng = Random(f"{seed} {name} {lang}")
        subjects = list(subjects[lang] if isinstance(subjects, dict) else subjects)
        fill(rng, lang, write, subjects, PRETRAIN_BYTES[lang] * share / whole, seen)
    return list(seen)


def fill(rng: Random, lang: str, write, subjects: list, wanted: float, seen: dict[str, None]) -> None:
    """Add texts until they have `wanted` bytes: all subjects in turn, in a new order each round, no repeats."""
    size = misses = 0
    while size < wanted and misses < 3:
        before = size
        for subject in rng.sample(subjects, len(subjects)):
            text = tidy(write(rng, lang, subject))
            if text not in seen and size < wanted:
                seen[text] = None
                size += len(json.dumps({"text": text}, ensure_ascii=False).encode()) + 1
        misses = misses + 1 if size == before else 0


def split_pretrain(seed: int) -> tuple[list[dict], list[dict]]:
    """Rows to train on and rows held back, in random order."""
    texts = pretrain_texts(seed, "zh") + pretrain_texts(seed, "en")
    Random(f"{seed} order").shuffle(texts)
    rows = [{"text": text} for text in texts]
    return [row for i, row in enumerate(rows) if i % VAL_EVERY], rows[::VAL_EVERY]


def write_text(path: Path, text: str) -> int:
    """Replace a file in one step; returns its size in bytes."""
    data = text.encode("utf-8")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
    return len(data)


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def generate(out_dir: Path, seed: int) -> None:
    """Write all files and print rows and bytes of each.

    Raises:
        ValueError: the files together are larger than the repository wants to carry.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    train, val = split_pretrain(seed)
    sft, sft_val = chat.conversations(seed)
    files = {
        "pretrain.jsonl": train,
        "pretrain_val.jsonl": val,
        "sft.jsonl": sft,
        "sft_val.jsonl": sft_val,
        "identity.jsonl": chat.identity(seed),
        "chat_eval.jsonl": chat.evaluation(),
        "prompts.jsonl": regression.PROMPTS,
        "regression_prompts.jsonl": regression.cases(),
    }
    texts = {name: (len(rows), jsonl(rows)) for name, rows in files.items()}
    lines = tales.plain_lines(seed)
    texts["plain.txt"] = (len(lines), "\n".join(lines) + "\n")
    total = sum(len(text.encode("utf-8")) for _, text in texts.values())
    if total > MAX_BYTES:
        raise ValueError(f"the sample data has {total} bytes, more than {MAX_BYTES}: lower PRETRAIN_BYTES")
    for name, (rows, text) in texts.items():
        print(f"{name:24} {rows:6} rows {write_text(out_dir / name, text):9} bytes")
    print(f"wrote {total} bytes to {out_dir}")


def main() -> None:
    args = parse_args()
    try:
        generate(Path(args.out_dir).expanduser(), args.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
