"""Rows for a run: documents packed into rows of max_length tokens, and the collator that makes batches of rows.

Packing is by best fit, so nearly every position of a batch is a real token. Documents stay apart: attention ends at
their borders (`cu_seqlens`, `document_ids`), positions start again at 0, and no label crosses a border, so a packed
document gets the loss and the gradients that it would get alone.

Where texts of pretraining fit badly, because most are longer than half a row, some are cut to fill the gaps, as too
long ones are cut anyway. Each part is then a document of its own, without what came before it; the report counts them.

    rows = Rows(dataset, packing=True, seed=42)
    loader = DataLoader(rows, batch_size=16, collate_fn=Collator(dataset.max_length, pad_token_id=0))
    rows.set_epoch(1)                                # other documents meet in a row; how many rows never changes
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, count
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

IGNORE_INDEX = -100
FULL = 0.98  # of the positions: documents are cut until that is reached, and no further


class Parts(NamedTuple):
    """Documents, or parts of them: which [D], from which token of it on [D], how many tokens [D]; int64."""

    documents: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of_whole(cls, lengths: np.ndarray) -> Parts:
        return cls(np.arange(len(lengths)), np.zeros_like(lengths), lengths)


class Rows(Dataset):
    """What a run trains on: item i is a row, (token ids [N], trained or not [N], lengths of its documents [D]).

    Args:
        dataset: gives `lengths` (of its documents), `max_length`, `may_cut` (whether a document may become several) and
            `take(indices, offsets, lengths)`: see `dataset.lm_dataset`.
        packing: several documents to a row, else one.
        seed: with the epoch it decides which documents of equal length go where.
        cut: whether documents may be cut to fill rows; not where a loss is to be that of whole documents.

    Attributes:
        report: that of the dataset, with packed_rows, fill, the share of the rows' positions that hold a token, and
            cut_to_fill, how many documents were cut for it.
        stats, digest: what the documents are and an identity of the rows, where `trainer.rows.open_rows` made them.
    """

    stats: Sequence[dict] = ()
    digest: str | None = None

    def __init__(self, dataset, packing: bool = True, seed: int = 42, cut: bool = True):
        self.dataset, self.packing, self.seed = dataset, packing, seed
        lengths, capacity = dataset.lengths, dataset.max_length
        self._parts = Parts.of_whole(lengths)
        if packing:
            order = np.argsort(-lengths, kind="stable")
            row_of = np.empty_like(order)
            row_of[order] = best_fit(lengths, capacity)
            if cut and dataset.may_cut and _fill(lengths, row_of, capacity) < FULL:
                self._parts, row_of = cut_to_fill(lengths, row_of, capacity)
            self._row_of = row_of[np.argsort(-self._parts.lengths, kind="stable")]  # from the longest to the shortest
        else:
            self._row_of = np.arange(len(lengths))
        self._ends = np.cumsum(np.bincount(self._row_of))  # [R] documents up to each row's end
        fill = _fill(self._parts.lengths, self._row_of, capacity)
        cut = int((np.bincount(self._parts.documents) > 1).sum())
        self.report = dataset.report | {"packed_rows": len(self), "fill": round(fill, 4), "cut_to_fill": cut}
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self._ends)

    def set_epoch(self, epoch: int) -> None:
        """Deal the documents out anew: any document may take the place of another of its length."""
        if not self.packing:
            self._dealt = np.arange(len(self._row_of))
            return
        shuffled = np.random.default_rng([self.seed % 2**32, epoch]).permutation(len(self._row_of))
        by_length = shuffled[np.argsort(-self._parts.lengths[shuffled], kind="stable")]
        self._dealt = by_length[np.argsort(self._row_of, kind="stable")]

    def parts(self, index: int) -> Parts:
        """The documents of a row, or the parts of documents."""
        here = self._dealt[self._ends[index - 1] if index else 0 : self._ends[index]]
        return Parts(*(column[here] for column in self._parts))

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.dataset.take(*self.parts(range(len(self))[index]))

    def where(self, index: int) -> str:
        """Names the documents of a row: see `dataset.sources.MixedRows.where`."""
        return self.dataset.where(*self.parts(range(len(self))[index]))

    def summary(self) -> str:
        """One line: that of the dataset, and what packing makes of it."""
        positions = f"{self.dataset.max_length:,} tokens, {self.report['fill']:.1%} full"
        how = f"packed into {len(self):,} rows of" if self.packing else "one to a row of"
        cut = f", {self.report['cut_to_fill']:,} cut to fill rows" if self.report["cut_to_fill"] else ""
        return f"{self.dataset.summary()}; {how} {positions}{cut}"


class Collator:
    """Lays rows out as a dict of tensors; B rows of T = max_length positions.

    `labels` follow the Hugging Face convention, in which the model does the shift: labels[t] is the token at t itself,
    or -100 where it is not trained, and the model compares logits[t - 1] with labels[t]. So the same batch can be
    given to any transformers model. The first token of a document has nothing of its own before it and is always
    -100, which also keeps the shift from crossing the border between two documents.

    Args:
        max_length: positions of a row. pad_token_id: what the rest of a row is filled with.

    Returns, when called with a list of rows as `Rows` gives them:
        input_ids, labels (-100 on pads), position_ids (0.. in each document, 0 on pads), document_ids (1, 2, ... in
        each row, 0 on pads): int64 [B, T].
        cu_seqlens: int32 [documents + 1], where each document of the flattened batch begins, the rest of a row that is
        not full being one too, and B * T at the end.
        label_positions: int64 [labels], the places in the flattened batch whose next token has a label.

    Raises:
        ValueError: a row holds more than max_length tokens.
    """

    def __init__(self, max_length: int, pad_token_id: int):
        self.max_length, self.pad_token_id = max_length, pad_token_id

    def __call__(self, rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
        T, sizes = self.max_length, [len(ids) for ids, _, _ in rows]
        if max(sizes) > T:
            raise ValueError(f"a row has {max(sizes):,} tokens but may hold {T:,}: give dataset and collator the same")
        ids = np.full((len(rows), T), self.pad_token_id, dtype=np.int64)
        labels = np.full_like(ids, IGNORE_INDEX)
        positions, numbers = np.zeros_like(ids), np.zeros_like(ids)
        starts = []
        for r, (row_ids, trained, lengths) in enumerate(rows):
            size, ends = len(row_ids), np.cumsum(lengths)
            ids[r, :size] = row_ids
            labels[r, :size][trained] = row_ids[trained]
            labels[r, ends - lengths] = IGNORE_INDEX
            positions[r, :size] = np.arange(size) - np.repeat(ends - lengths, lengths)
            numbers[r, :size] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
            starts.append(r * T + np.append(ends - lengths, size)[: len(lengths) + (size < T)])
        cu_seqlens = np.concatenate([*starts, [len(rows) * T]])
        batch = {"input_ids": ids, "labels": labels, "position_ids": positions, "document_ids": numbers}
        batch |= {"cu_seqlens": cu_seqlens.astype(np.int32)}
        batch |= {"label_positions": np.flatnonzero(labels != IGNORE_INDEX) - 1}  # never 0: a document's first has none
        return {name: torch.from_numpy(np.ascontiguousarray(array, array.dtype)) for name, array in batch.items()}


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each document, int64 [documents], the documents taken from the longest to the shortest.

    Best fit decreasing: each goes into the fullest row that has room for it (https://arxiv.org/abs/2404.10830 uses it
    for pretraining). Rows with equal room are alike, so all documents of one length are placed together, and the time
    grows with how many lengths there are: milliseconds for a million documents.

    Raises:
        ValueError: a document is longer than capacity.
    """
    counts = np.bincount(lengths, minlength=capacity + 1)
    if len(counts) > capacity + 1:
        raise ValueError(f"a document has {len(counts) - 1:,} tokens but a row holds {capacity:,}: give both the same")
    with_room: dict[int, np.ndarray] = {}  # room -> the rows that have as much
    rooms, opened, placed = 0, 0, []  # rooms: bit r is set if with_room has r
    for length in np.flatnonzero(counts[1:])[::-1].tolist():
        length, left = length + 1, int(counts[length + 1])
        while left:
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = room // length  # documents of this length for one row: after the first it is the fullest that fits
            wanted = -(-left // each)
            if fitting:
                rows, rest = np.split(with_room.pop(room), [wanted])
                rooms &= ~(1 << room)
                if len(rest):
                    with_room[room], rooms = rest, rooms | 1 << room
            else:
                rows, opened = np.arange(opened, opened + wanted), opened + wanted
            taken = np.full(len(rows), each)
            taken[-1] = min(left - each * (len(rows) - 1), each)
            placed.append(np.repeat(rows, taken))
            left -= int(taken.sum())
            for amount in np.unique(taken).tolist():
                now = room - amount * length
                with_room[now] = np.append(with_room.get(now, np.empty(0, np.int64)), rows[taken == amount])
                rooms |= 1 << now
    return np.concatenate(placed) if placed else np.empty(0, np.int64)


def _fill(lengths: np.ndarray, row_of: np.ndarray, capacity: int) -> float:
    """The share of the rows' positions that hold a token."""
    return float(lengths.sum() / ((int(row_of.max(initial=-1)) + 1) * capacity)) if len(lengths) else 0.0


def cut_to_fill(lengths: np.ndarray, row_of: np.ndarray, capacity: int) -> tuple[Parts, np.ndarray]:
    """Empty the rows that are filled least, and fill the gaps of the others with parts of their documents.

    Parts of one document share a token, the last of the one and the first of the next, so every token but the first is
    still predicted exactly once. No part of a cut document is shorter than a sixteenth of a row, lest it has too little
    context, and no more rows are emptied than it takes to fill the others to FULL.

    Args:
        lengths, row_of: int64 [documents].

    Returns: all documents or their parts, and the row of each, int64; rows are numbered without a hole.
    """
    loads = np.bincount(row_of, weights=lengths).astype(np.int64)
    gaps, least = capacity - loads, max(capacity // 16, 2)
    by_load = np.argsort(loads, kind="stable")
    room = np.where(gaps >= least, gaps - 1, 0)[by_load]  # of each gap a token goes to the overlap
    emptied = np.cumsum(loads[by_load]) <= room.sum() - np.cumsum(room)  # so many rows fit into the gaps of the rest
    emptied &= np.arange(len(loads)) < len(loads) - math.ceil(lengths.sum() / (FULL * capacity))
    is_emptied = np.zeros(len(loads), dtype=bool)
    is_emptied[by_load[emptied]] = True
    largest_first = ((row, int(gaps[row])) for row in by_load[~emptied].tolist() if gaps[row] >= least)
    places = chain(largest_first, ((row, capacity) for row in count(len(loads))))
    parts, (row, gap) = [], next(places)
    for document in np.flatnonzero(is_emptied[row_of]).tolist():
        offset, left = 0, int(lengths[document])
        while True:
            if gap < min(least, left):
                row, gap = next(places)
            size = min(gap, left)
            if size < left < size + least - 1:  # what is left would be too short
                size = left + 1 - least
            parts.append((document, offset, size, row))
            gap -= size
            if size == left:
                break
            offset, left = offset + size - 1, left - size + 1
    kept = np.flatnonzero(~is_emptied[row_of])
    *columns, rows = np.array(parts, dtype=np.int64).reshape(-1, 4).T
    whole = kept, np.zeros_like(kept), lengths[kept]
    joined = Parts(*(np.concatenate(pair) for pair in zip(whole, columns, strict=True)))
    return joined, np.unique(np.concatenate([row_of[kept], rows]), return_inverse=True)[1]
