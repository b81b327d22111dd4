"""Command-line flags that all stages share, and where a path that a user typed is looked for.

Imports nothing heavy, so that the data scripts can use the path functions without waiting for torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_DIR = ROOT / "dataset" / "sample"


def input_path(path: str | Path) -> Path:
    """Find an existing file or folder: as given from the working directory, else from the repository root.

    The design documents type `../dataset/x.jsonl` in `trainer/` and `./dataset/x.jsonl` in the root; both mean the same
    file, so leading `./` and `../` are dropped for the second look.

    Raises:
        FileNotFoundError: names both places and, where the repository has one, the sample file of that kind.
    """
    path = Path(path).expanduser()
    if path.exists():
        return path
    parts = [part for part in path.parts if part not in (".", "..")]
    from_root = path if path.is_absolute() else ROOT.joinpath(*parts)
    if from_root.exists():
        return from_root
    places = str(path) if path.is_absolute() else f"{Path.cwd() / path} or {from_root}"
    raise FileNotFoundError(f"no file at {places}: check the path{sample_hint(path.name)}")


def sample_hint(name: str) -> str:
    """A sentence that names the sample file which could stand in for a missing data file, or nothing."""
    for kind, sample in (("pretrain", "pretrain.jsonl"), ("identity", "identity.jsonl"), ("sft", "sft.jsonl")):
        if kind in name and (SAMPLE_DIR / sample).exists():
            return f", or try the sample data first: --data_path dataset/sample/{sample}"
    return ""


def output_path(path: str | Path) -> Path:
    """A path to write to: relative ones belong to the working directory (defaults are absolute, below the root)."""
    return Path(path).expanduser().absolute()
