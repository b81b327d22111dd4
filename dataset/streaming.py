"""Rows that are tokenised and packed while a run trains on them: for data too large to cache, or read from the hub.

Documents are shuffled and packed within windows of about two million tokens, so shuffle the file once if its order
means something. When the source ends it begins again, in another order. Every process reads all of it and trains on
its share; a resumed run reads again, without training, what it had trained on.

    rows = StreamedRows("org/name:train", tokenizer, PretrainRecipe(), max_length=512, length=16 * 1000)
    loader = DataLoader(rows, batch_size=16, collate_fn=Collator(512, tokenizer.pad_token_id))
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

import numpy as np
from torch.utils.data import IterableDataset

from dataset.encode import FrozenTokenizer, PretrainRecipe, SFTRecipe, cut_rows, split_rows
from dataset.jsonl import read_rows
from dataset.packing import Rows
from dataset.token_cache import encoded_batches

WINDOW_TOKENS = 1 << 21

Row = tuple[np.ndarray, np.ndarray, np.ndarray]


class StreamedRows(IterableDataset):
    """Packed rows without end, of which a run takes `length`; each like an item of `dataset.packing.Rows`.

    Args:
        path: what `dataset.jsonl.read_rows` reads. recipe: `PretrainRecipe()` or `SFTRecipe(train_on)`.
        length: rows that the run takes in all.

    Attributes:
        digest: sha256 over all that decides which rows come in which order, but for the content of the source.
        stats: what `trainer.rows.open_rows` says about the source.

    Raises, while it is iterated:
        ValueError, OSError, BadRow: what `read_rows` raises; a source in which no row can be trained on.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer,
        recipe: PretrainRecipe | SFTRecipe,
        max_length: int,
        length: int,
        packing: bool = True,
        seed: int = 42,
        on_bad_row: str = "raise",
    ):
        self.path, self.recipe, self.max_length, self.length = str(path), recipe, max_length, length
        self.tokenizer = FrozenTokenizer(tokenizer, recipe.templated)
        self.packing, self.seed, self.on_bad_row = packing, seed, on_bad_row
        self.report = {"streamed": 1}
        what = [self.path, repr(recipe), self.tokenizer.digest, max_length, packing, seed]
        self.digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        self.stats: list[dict] = []

    def __len__(self) -> int:
        return self.length

    def where(self, index: int) -> str:
        """Names a row, such as "row 17 of the stream" for index 16."""
        return f"row {index + 1:,} of the stream"

    def summary(self) -> str:
        return f"{self.length:,} rows of {self.max_length:,} tokens, tokenised on the way from {self.path}"

    def __iter__(self) -> Iterator[Row]:
        taken = 0
        for number, window in enumerate(self._windows()):
            rows = Rows(window, self.packing, self.seed)
            rows.set_epoch(number)
            for index in np.random.default_rng([self.seed % 2**32, number, 1]).permutation(len(rows)):
                if taken == self.length:
                    return
                yield rows[int(index)]
                taken += 1

    def _windows(self) -> Iterator[_Window]:
        lay_out = cut_rows if self.recipe.templated else split_rows
        for _ in count():  # once through the source each time
            parts, tokens, found = [], 0, False
            with closing(read_rows_encoded(self.path, self.on_bad_row, self.tokenizer, self.recipe)) as batches:
                for encoded in batches:
                    layout = lay_out(encoded, self.max_length)
                    if not len(layout):
                        continue
                    parts.append(layout.take(np.arange(len(layout))))
                    tokens, found = tokens + len(parts[-1][0]), True
                    if tokens >= WINDOW_TOKENS:
                        yield _Window(parts, self.max_length, may_cut=not self.recipe.templated)
                        parts, tokens = [], 0
            if parts:
                yield _Window(parts, self.max_length, may_cut=not self.recipe.templated)
            if not found:
                raise ValueError(
                    f"{self.path}: no row has a token to train on within {self.max_length} tokens: "
                    "check the data, or raise --max_seq_len"
                )


class _Window:
    """Documents in memory, as `Rows` takes them."""

    def __init__(self, parts: list[Row], max_length: int, may_cut: bool):
        self.ids, self.trained, self.lengths = (np.concatenate(column) for column in zip(*parts, strict=True))
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.max_length, self.may_cut, self.report = max_length, may_cut, {}

    def take(self, indices: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> Row:
        begins = np.cumsum(lengths) - lengths
        places = np.repeat(self.starts[indices] + offsets - begins, lengths) + np.arange(lengths.sum())
        trained = self.trained[places]
        trained[begins] = False
        return self.ids[places], trained, lengths


def read_rows_encoded(path: str, on_bad_row: str, tokenizer: FrozenTokenizer, recipe) -> Iterator:
    """Batches of a source from its beginning, encoded in this process: training has the others."""
    yield from encoded_batches(read_rows(path, on_bad_row), tokenizer, recipe, workers=0)
