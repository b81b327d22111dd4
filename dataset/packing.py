"""Rows for a run: documents packed into rows of max_length tokens, and the collator that makes batches of rows.

Packing is by best fit, so nearly every position of a batch is a real token. Documents stay apart: attention ends at
their borders (`cu_seqlens`, `document_ids`), positions start again at 0, and no label crosses a border, so a packed
document gets the loss and the gradients that it would get alone.

    rows = Rows(dataset, packing=True, seed=42)
    loader = DataLoader(rows, batch_size=16, collate_fn=Collator(dataset.max_length, pad_token_id=0))
    rows.set_epoch(1)                                # other documents meet in a row; how many rows never changes
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

IGNORE_INDEX = -100


class Rows(Dataset):
    """What a run trains on: item i is a row, (token ids [N], trained or not [N], lengths of its documents [D]).

    Args:
        dataset: gives `lengths` (of its documents), `max_length` and `take(indices)`: see `dataset.lm_dataset`.
        packing: several documents to a row, else one.
        seed: with the epoch it decides which documents of equal length go where.

    Attributes:
        report: that of the dataset, with packed_rows and fill, the share of the rows' positions that hold a token.
    """

    def __init__(self, dataset, packing: bool = True, seed: int = 42):
        self.dataset, self.packing, self.seed = dataset, packing, seed
        lengths = dataset.lengths
        self._row_of = best_fit(lengths, dataset.max_length) if packing else np.arange(len(lengths))
        sizes = np.bincount(self._row_of)  # [R] documents of each row
        self._ends = np.cumsum(sizes)
        fill = float(lengths.sum() / (len(self) * dataset.max_length))
        self.report = dataset.report | {"packed_rows": len(self), "fill": round(fill, 4)}
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self._ends)

    def set_epoch(self, epoch: int) -> None:
        """Deal the documents out anew: any document may take the place of another of its length."""
        if not self.packing:
            self._documents = np.arange(len(self._row_of))
            return
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(self._row_of))
        by_length = shuffled[np.argsort(-self.dataset.lengths[shuffled], kind="stable")]
        self._documents = by_length[np.argsort(self._row_of, kind="stable")]

    def documents(self, index: int) -> np.ndarray:
        """Indices of the documents of a row, int64 [D]."""
        return self._documents[self._ends[index - 1] if index else 0 : self._ends[index]]

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.dataset.take(self.documents(range(len(self))[index]))

    def summary(self) -> str:
        """One line: that of the dataset, and what packing makes of it."""
        positions = f"{self.dataset.max_length:,} tokens, {self.report['fill']:.1%} full"
        how = f"packed into {len(self):,} rows of" if self.packing else "one to a row of"
        return f"{self.dataset.summary()}; {how} {positions}"


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
        ids, labels = np.full((len(rows), T), self.pad_token_id), np.full((len(rows), T), IGNORE_INDEX)
        positions, numbers = np.zeros_like(ids), np.zeros_like(ids)
        starts = []
        for r, (row_ids, trained, lengths) in enumerate(rows):
            size, ends = len(row_ids), np.cumsum(lengths)
            ids[r, :size] = row_ids
            labels[r, :size][trained] = row_ids[trained]
            labels[r, ends - lengths] = IGNORE_INDEX
            positions[r, :size] = np.arange(size) - np.repeat(ends - lengths, lengths)
            numbers[r, :size] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
            starts.append(r * T + np.append(ends - lengths, [size] if size < T else []))
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
