"""Several files as one: how much of each is trained on, which of its documents are held back, and what was kept.

Documents are held back by their content alone: no seed, no place in a file and no other file moves one to the other
side, and equal documents are always on the same. How many of the others are kept is exact, and which ones goes by
content and seed, so a larger share is the smaller one and more. Both are decided on whole documents, before they are
cut or split.

    samplings = read_sampling("mix.json", ["dataset/sft_zh.jsonl", "dataset/sft_en.jsonl"], Sampling(val_ratio=0.01))
    source = split_source("dataset/sft_zh.jsonl", SFTDataset("dataset/sft_zh.jsonl", tokenizer), samplings[0], seed=42)
    mixed = MixedRows([source.name, ...], [source.train, ...])
    rows = Rows(mixed)                               # of dataset.packing
    print(rows.where(17))                            # dataset/sft_zh.jsonl documents 17, 30 and part of 41
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from dataset.encode import ranges, splitmix64
from dataset.lm_dataset import TokenRows

_OTHER_NAMES = {"val_split": "val_ratio"}


@dataclass(frozen=True)
class Sampling:
    """How much of a source is used.

    ratio: share of the documents that are not held back; above 1 they are repeated. max_samples: the most of them,
    None: no limit. val_ratio: share of the documents that is held back, of which ratio and max_samples take nothing.

    Raises:
        ValueError: what is wrong, without the name of the source.
    """

    ratio: float = 1.0
    max_samples: int | None = None
    val_ratio: float = 0.0

    def __post_init__(self):
        if not _is_number(self.ratio) or self.ratio < 0:
            raise ValueError(f"ratio is {self.ratio!r}: give a number of at least 0; above 1 repeats documents")
        if self.max_samples is not None and (type(self.max_samples) is not int or self.max_samples < 0):
            raise ValueError(f"max_samples is {self.max_samples!r}: give a whole number, or null for no limit")
        if not _is_number(self.val_ratio) or not 0 <= self.val_ratio < 1:
            raise ValueError(f"val_ratio is {self.val_ratio!r}: give a number from 0 up to 1")

    @property
    def skips(self) -> bool:
        """Whether the source is left out altogether, also where it would be held back."""
        return self.ratio == 0 or self.max_samples == 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# --- which documents --------------------------------------------------------------------------------------------------


def held_back(hashes: np.ndarray, val_ratio: float) -> np.ndarray:
    """Which documents are held back, bool [D]: those whose hash is below val_ratio * 2^64.

    Args:
        hashes: uint64 [D], evenly spread, as `dataset.encode.content_hashes` are.
    """
    return hashes < np.uint64(int(val_ratio * 2.0**64))


def sampled_copies(hashes: np.ndarray, sampling: Sampling, seed: int) -> np.ndarray:
    """How often each document is trained on, int64 [D]: 0 for those that are held back.

    Of the n others round(ratio * n) are kept, max_samples at most: each so many times as they are more than n, and
    those with the smallest seeded hash once more. Of equal documents the first ones are taken.
    """
    copies = np.zeros(len(hashes), dtype=np.int64)
    others = np.flatnonzero(~held_back(hashes, sampling.val_ratio))
    if not len(others):
        return copies
    total = round(sampling.ratio * len(others))
    if sampling.max_samples is not None:
        total = min(total, sampling.max_samples)
    each, more = divmod(total, len(others))
    copies[others] = each
    if more:
        keys = splitmix64(hashes[others] ^ splitmix64(np.array([seed % 2**64], dtype=np.uint64)))
        last = np.partition(keys, more - 1)[more - 1]
        copies[others[keys < last]] += 1
        copies[others[keys == last][: more - int((keys < last).sum())]] += 1
    return copies


# --- the sampling file ------------------------------------------------------------------------------------------------


def read_sampling(path: str | Path | None, names: Sequence[str], default: Sampling) -> list[Sampling]:
    """How much of each source is used, as a JSON file says: {"sft_zh.jsonl": {"ratio": 0.5}, "default": {...}}.

    What the entry of a file leaves out is taken from "default", and what that leaves out from `default`. The ratio is
    multiplied by that of `default`, which thus is one for all.

    Args:
        path: None: all of them are the default. names: paths or names of the sources; an entry means those of that
            path or file name.

    Raises:
        ValueError, OSError: the file is no JSON of that form; it has an unknown key, a wrong value or a name that is
            none of the sources.
    """
    entries = {} if path is None else _entries(Path(path))
    known = {"default", *names, *(Path(name).name for name in names)}
    if unknown := [name for name in entries if name not in known]:
        files = ", ".join(dict.fromkeys(Path(name).name for name in names))
        raise ValueError(f"{path} names {', '.join(unknown)}, but the sources are {files}: correct the name")
    found = []
    for name in names:
        chosen = [entries.get(key, {}) for key in dict.fromkeys(["default", Path(name).name, name])]
        merged = {key: value for entry in chosen for key, value in entry.items()}
        sampling = replace(default, **{"ratio": 1.0, **merged})
        found.append(replace(sampling, ratio=sampling.ratio * default.ratio))
    return found


def _entries(path: Path) -> dict[str, dict]:
    """The entries of a sampling file, each checked, with one name for each key."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; repair it") from error
    example = '{"file.jsonl": {"ratio": 0.5, "max_samples": 1000, "val_ratio": 0.01}}'
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{path} is not an object of objects: write it as {example}")
    found = {}
    for name, entry in entries.items():
        renamed = {_OTHER_NAMES.get(key, key): value for key, value in entry.items()}
        if unknown := [key for key in renamed if key not in Sampling.__dataclass_fields__]:
            raise ValueError(f"{path}: {name}: unknown key {', '.join(unknown)}; use ratio, max_samples, val_ratio")
        if len(renamed) < len(entry):
            raise ValueError(f"{path}: {name}: val_split and val_ratio are the same; keep one of them")
        try:
            Sampling(**renamed)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from error
        found[name] = renamed
    return found


# --- sources ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A source and what is made of it. name: as it was given. data: all of it, None if it was skipped, unread.

    train: the rows to train on. held_back: rows of the documents that are held back, None where none should be.
    """

    name: str
    sampling: Sampling
    data: TokenRows | None
    train: TokenRows | None
    held_back: TokenRows | None

    def why_empty(self) -> str:
        """Why there is no row to train on, and what to do."""
        if self.data is None:
            return f"{self.name}: its ratio or max_samples is 0"
        if not len(self.data) or self.train.report.get("dropped"):
            return self.train.why_empty()
        n, held = len(self.data.hashes), int(held_back(self.data.hashes, self.sampling.val_ratio).sum())
        return (
            f"{self.name}: of its {n:,} documents {held:,} are held back, and a ratio of {self.sampling.ratio:g} keeps "
            "none of the others: raise the ratio, or lower the val_ratio"
        )

    @property
    def stats(self) -> dict:
        """What was read and what is kept, for dataset_stats.json.

        original_samples: documents or conversations in the source (a row of pretraining may hold several).
        sampled_samples: of those, with repeats, the ones that were chosen to be trained on or held back.
        train_samples, val_samples: what of them is left with a token to train on within max_length. repeated: copies
        beyond the first. The other counts are those of the rows to train on, see `dataset.lm_dataset`.
        """
        name, config = Path(self.name).name, {"sampling_config": asdict(self.sampling)}
        if self.data is None:
            kept = dict.fromkeys(("sampled_samples", "train_samples", "val_samples"), 0)
            return {"dataset": name, "path": self.name, "digest": None, "original_samples": None, **kept, **config}
        report, held = self.train.report, {"rows": 0} if self.held_back is None else self.held_back.report
        samples, val_samples = _samples(report), _samples(held)
        dropped = report.get("dropped", 0) + held.get("dropped", 0)
        return {
            "dataset": name,
            "path": self.data.path,
            "digest": self.data.digest,
            "original_samples": len(self.data.hashes),
            "sampled_samples": samples + val_samples + dropped,
            "train_samples": samples,
            "val_samples": val_samples,
            **config,
            **report,
            "repeated": samples - len(np.unique(self.train.documents()[0])),
        }


def _samples(report: dict[str, int]) -> int:
    """Documents, or conversations where each is a row."""
    return report.get("documents", report["rows"])


def split_source(name: str, data: TokenRows | None, sampling: Sampling, seed: int) -> Source:
    """What of a source is trained on and what is held back; the token ids are shared by both.

    Args:
        data: all of the source; None where `sampling.skips`.
    """
    if data is None:
        return Source(name, sampling, None, None, None)
    if sampling == Sampling():
        return Source(name, sampling, data, data, None)
    train = data.choose(sampled_copies(data.hashes, sampling, seed))
    if not sampling.val_ratio:
        return Source(name, sampling, data, train, None)
    held = data.choose(held_back(data.hashes, sampling.val_ratio))
    # what the whole file lacks is counted once, with the rows to train on
    held.report |= {count: 0 for count in ("empty", "bad_rows") if count in held.report}
    return Source(name, sampling, data, train, held)


class MixedRows(Dataset):
    """Rows of several sources of one kind, one after the other, for `dataset.packing.Rows`.

    Args:
        names: of the sources, for messages. parts: their rows; all with the same max_length, at least one.

    Attributes:
        max_length, may_cut: as of each part. report: their counts, summed.
    """

    def __init__(self, names: Sequence[str], parts: Sequence[TokenRows]):
        self.names, self.parts = list(names), list(parts)
        self.max_length, self.may_cut = self.parts[0].max_length, self.parts[0].may_cut
        self.report = {name: sum(part.report[name] for part in self.parts) for name in self.parts[0].report}
        self._starts = np.cumsum([0, *map(len, self.parts)])  # [parts + 1]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def lengths(self) -> np.ndarray:
        """int64 [rows]: tokens of each row before padding."""
        return np.concatenate([part.lengths for part in self.parts])

    def take(
        self,
        indices: Sequence[int] | np.ndarray,
        offsets: np.ndarray | None = None,
        lengths: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows `indices` end to end, in the order asked: as `dataset.lm_dataset.TokenRows.take`.

        Raises:
            IndexError: there is no such row.
        """
        if len(self.parts) == 1:
            return self.parts[0].take(indices, offsets, lengths)
        indices = np.asarray(indices, dtype=np.int64)
        part_of, places, taken = self._locate(indices), [], []
        for number in np.flatnonzero(np.bincount(part_of)).tolist() or [0]:
            here = np.flatnonzero(part_of == number)
            some = (None if column is None else np.asarray(column)[here] for column in (offsets, lengths))
            taken.append(self.parts[number].take(indices[here] - self._starts[number], *some))
            places.append(here)
        if len(taken) == 1:
            return taken[0]
        ids, trained, sizes = (np.concatenate(column) for column in zip(*taken, strict=True))
        order = np.argsort(np.concatenate(places))
        tokens = ranges((np.cumsum(sizes) - sizes)[order], sizes[order])
        return ids[tokens], trained[tokens], sizes[order]

    def _locate(self, indices: np.ndarray) -> np.ndarray:
        """The part in which each row is, int64 [indices]."""
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows {indices.min():,} to {indices.max():,} were asked, but there are {len(self):,}")
        return np.searchsorted(self._starts, indices, side="right") - 1

    def where(self, indices: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> str:
        """Names documents, counted from 1, such as "a.jsonl documents 17, 30 and part of 41; b.jsonl document 2".

        Args:
            indices, offsets, lengths: rows, or parts of rows, as for `take`.
        """
        part_of, found = self._locate(np.asarray(indices)), []
        for number in np.flatnonzero(np.bincount(part_of)).tolist():
            here = part_of == number
            documents, whole = self.parts[number].documents(indices[here] - self._starts[number])
            is_part = dict(sorted(zip((documents + 1).tolist(), (lengths[here] < whole).tolist(), strict=True)))
            words = [f"part of {document}" if cut else str(document) for document, cut in is_part.items()]
            if len(words) > 1:
                found.append(f"{self.names[number]} documents {', '.join(words[:-1])} and {words[-1]}")
            else:
                ((document, cut),) = is_part.items()
                found.append(f"{self.names[number]} {'part of ' if cut else ''}document {document}")
        return "; ".join(found)

    def summary(self) -> str:
        """One line: that of the rows, with how many sources there are if there are several."""
        line = self.parts[0].describe(self.report, self.max_length)
        return line if len(self.parts) == 1 else f"{len(self.parts)} sources: {line}"

    @property
    def content(self) -> np.ndarray:
        """uint64: the hash of each document of which there is a row, once for each source."""
        return np.concatenate([part.hashes[np.unique(part.documents()[0])] for part in self.parts])


def leaks(train: MixedRows, val: MixedRows) -> tuple[int, int]:
    """(held-back documents that are trained on too, all held-back documents)."""
    content = val.content
    return int(np.isin(content, train.content).sum()), len(content)
