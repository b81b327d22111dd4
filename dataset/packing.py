"""The collator: items of a dataset become one batch without waste, several documents to a row.

Documents are packed whole, first-fit-decreasing, so a batch costs what its tokens cost and not what padding would.
`document_ids` keeps them apart: a token attends only to tokens of the same id in its row (a block-diagonal causal
mask), and `position_ids` start again at 0 in every document, so a packed document gets the logits that it would get
in a row of its own.

    loader = DataLoader(dataset, batch_size=32, collate_fn=Collator(max_length=512, pad_token_id=0))
    batch = next(iter(loader))                       # input_ids, labels, position_ids, document_ids: [R, T]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

IGNORE_INDEX = -100


class Collator:
    """Packs (X, Y, loss_mask) items, or pads them when `pack` is false, into a dict of int64 tensors [R, T].

    `labels` follow the Hugging Face convention, in which the model does the shift: labels[t] is the token at t itself,
    or -100 where it is not trained, and the model compares logits[t - 1] with labels[t]. So the same batch can be
    given to any transformers model. The first token of a document has nothing of its own before it and is always
    -100, which also keeps the shift from crossing the border between two documents.

    Args:
        max_length: tokens that a packed row may hold.
        pad_token_id: id of the padding in the items, and written into the batch.
        pack: True: as few rows as first-fit-decreasing finds (R <= number of items, T the longest row).
            False: one document per row, in order (R = number of items, T the longest document).

    Returns, when called with a list of items:
        input_ids: padded with pad_token_id. labels: -100 on pads. position_ids: 0.. per document, 0 on pads.
        document_ids: 1, 2, ... per row, 0 on pads.

    Raises:
        ValueError: an item holds more than `max_length` tokens, or no item has a token.
    """

    def __init__(self, max_length: int, pad_token_id: int, pack: bool = True):
        self.max_length, self.pad_token_id, self.pack = max_length, pad_token_id, pack

    def __call__(self, items: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        tokens, labels, lengths = self._documents(items)
        if lengths.max(initial=0) > self.max_length:
            raise ValueError(
                f"a document has {lengths.max():,} tokens but a row holds {self.max_length:,}: give dataset and "
                "collator the same max_length"
            )
        rows = first_fit_decreasing(lengths, self.max_length) if self.pack else [[i] for i in range(len(lengths))]
        return self._lay_out(tokens, labels, lengths, rows)

    def _documents(self, items: Sequence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids and labels of the items' documents, end to end [N], and their lengths [D]."""
        columns = [torch.stack(list(column)).numpy() for column in zip(*items, strict=True)]
        x, y, trained = columns[0], columns[1], columns[2].astype(bool)  # [B, L - 1]
        ids = np.concatenate([x, y[:, -1:]], axis=1)  # [B, L]; X and Y are this without its last, without its first
        trained = np.pad(trained, ((0, 0), (1, 0)))  # [B, L], now aligned with ids
        # a pad id inside a document is a token like others; only what follows the last real token is padding
        real = (ids != self.pad_token_id) | trained
        lengths = np.where(real.any(axis=1), ids.shape[1] - real[:, ::-1].argmax(axis=1), 0)
        inside = np.arange(ids.shape[1]) < lengths[:, None]
        labels = np.where(trained, ids, IGNORE_INDEX)
        lengths = lengths[lengths > 0]
        if not len(lengths):
            raise ValueError(f"none of the {len(items)} items has a token: all are padding ({self.pad_token_id})")
        return ids[inside], labels[inside], lengths

    def _lay_out(
        self, tokens: np.ndarray, labels: np.ndarray, lengths: np.ndarray, rows: list[list[int]]
    ) -> dict[str, torch.Tensor]:
        width = max(int(lengths[row].sum()) for row in rows)
        starts = np.empty_like(lengths)  # [D] place of a document's first token in the flattened batch
        numbers = np.empty_like(lengths)  # [D] 1, 2, ... in its row
        for r, row in enumerate(rows):
            ends = np.cumsum(lengths[row])
            starts[row] = r * width + ends - lengths[row]
            numbers[row] = np.arange(1, len(row) + 1)
        positions = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # [N]
        places = np.repeat(starts, lengths) + positions  # [N]

        def spread(values: np.ndarray, fill: int) -> torch.Tensor:
            flat = np.full(len(rows) * width, fill, dtype=np.int64)
            flat[places] = values
            return torch.from_numpy(flat).view(len(rows), width)

        return {
            "input_ids": spread(tokens, self.pad_token_id),
            "labels": spread(labels, IGNORE_INDEX),
            "position_ids": spread(positions, 0),
            "document_ids": spread(np.repeat(numbers, lengths), 0),
        }


def first_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of document indices, each row's lengths summing to at most `capacity`; at most 11/9 of the best + 1 rows.

    The longest document is placed first, each into the first row that has room for it (Johnson 1973). Equal lengths
    keep their order, the documents of a row are in order, and rows are ordered by their first document, so the result
    depends on nothing but `lengths`.
    """
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), dtype=np.int64)  # of a row not yet begun: set when it is
    for index in np.argsort(-lengths, kind="stable"):
        length = lengths[index]
        row = int(np.argmax(room[: len(rows)] >= length)) if rows else 0
        if row == len(rows) or room[row] < length:  # argmax of all False is 0
            row = len(rows)
            room[row] = capacity
            rows.append([])
        room[row] -= length
        rows[row].append(int(index))
    return sorted(sorted(row) for row in rows)
