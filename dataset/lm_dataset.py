"""The datasets of pretraining and supervised fine-tuning: a file becomes (X, Y, loss_mask) rows of token ids.

Everything is tokenised once, into flat arrays of two bytes per token. With `cache_dir` they are files that are mapped
into memory, and the next start opens them at once (token_cache.py). Nothing is lost silently: long texts are split into
rows, and what does not fit into a conversation's row is counted in `report` and said by `summary()`.

    tokenizer = AutoTokenizer.from_pretrained("model")
    dataset = PretrainDataset("dataset/pretrain_hq.jsonl", tokenizer, max_length=512, cache_dir="out/cache")
    dataset = PlainTextDataset("my.txt", tokenizer, max_length=512, concatenate=True)
    dataset = SFTDataset("dataset/sft_mini_512.jsonl", tokenizer, max_length=340)
    X, Y, loss_mask = dataset[0]                     # int64 [max_length - 1] each; loss_mask[i] is for Y[i]
    ids, trained, lengths = dataset.take([0, 5, 7])  # the same rows end to end, without padding
    half = dataset.choose(dataset.hashes % 2)        # other documents of the same data; see sources.py
    print(dataset.summary())
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from dataset.encode import (
    Encoded,
    FrozenTokenizer,
    Layout,
    PretrainRecipe,
    SFTRecipe,
    cut_rows,
    encode_documents,
    split_documents,
    split_rows,
)
from dataset.jsonl import BadRow, check_file, decode_line, open_bytes
from dataset.token_cache import source_digest, tokenise


class TokenRows(Dataset):
    """Rows of token ids, kept end to end in one array.

    Item i is (X, Y, loss_mask), int64 tensors [max_length - 1]: the row padded on the right with pad_token_id to
    max_length, without its last token (X) and without its first (Y); loss_mask is 1 where Y is trained, 0 on pads.
    Pickled, as for a DataLoader's processes on Windows, rows of a cache are but the names of its files.

    Attributes:
        report: counts, see the datasets. may_cut: whether packing may cut a row to fill others; a conversation stays
            whole, a text of pretraining is split where it is too long anyway. path: where the rows are from.
    """

    may_cut = True

    def __init__(self, path: str | Path, tokenizer: PreTrainedTokenizerBase, max_length: int):
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}: a row needs at least 2 tokens, one to predict another")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"the tokenizer has no {name}: use one that has, such as the repository's `model`")
        self.path, self.max_length, self.pad_token_id = str(path), max_length, tokenizer.pad_token_id
        self.report: dict[str, int] = {}
        self._layout: Layout

    @property
    def lengths(self) -> np.ndarray:
        """int64 [rows]: tokens of each row before padding."""
        return self._layout.lengths

    @property
    def hashes(self) -> np.ndarray:
        """uint64 [documents]: `dataset.encode.content_hashes` of all documents of the file, also of those left out."""
        return self._layout.encoded.hashes

    @cached_property
    def digest(self) -> str | None:
        """sha256 of the file; None for a name on the hub."""
        return source_digest(self._layout.encoded, self.path)

    def __len__(self) -> int:
        return len(self._layout)

    def choose(self, copies: np.ndarray) -> TokenRows:
        """Rows of other documents of the same data, counted anew; the token ids are shared. There may be no row left.

        Only `empty` and `bad_rows` of the report are still those of the whole file.

        Args:
            copies: how often each document of the file is there, integers >= 0, as many as `hashes`; 0 leaves it out.
        """
        encoded = self._layout.encoded
        if len(copies) != len(encoded.lengths):
            raise ValueError(f"{self.path} has {len(encoded.lengths):,} documents, but copies are for {len(copies):,}")
        copies = np.asarray(copies).astype(np.min_scalar_type(copies.max(initial=0)))
        chosen = copy(self)
        chosen._layout = self._layout.lay_out(encoded, self.max_length, copies)
        chosen.report = self.report | chosen._layout.report
        return chosen

    def documents(self, indices: Sequence[int] | np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """The documents of which the rows `indices` are, counted from 0 in the file, and their tokens: int64 [indices].

        A row that has fewer tokens than its document is a part of it.
        """
        return self._layout.documents(indices)

    def summary(self) -> str:
        """One line that says what `report` counts."""
        return self.describe(self.report, self.max_length)

    def take(
        self,
        indices: Sequence[int] | np.ndarray,
        offsets: np.ndarray | None = None,
        lengths: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows `indices` end to end, without padding; with offsets and lengths a part of each.

        Args:
            offsets: the first token of each row that is taken; lengths: how many; int64, as many as indices.

        Returns:
            token ids int64 [N], trained bool [N] (never a row's first token, which nothing predicts), and the rows'
            lengths int64 [len(indices)], N in all.

        Raises:
            IndexError: there is no such row.
        """
        return self._layout.take(indices, offsets, lengths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, trained, _ = self.take([index])
        row = torch.full((self.max_length,), self.pad_token_id)
        row[: len(ids)] = torch.from_numpy(ids)
        mask = torch.zeros(self.max_length, dtype=torch.int64)
        mask[: len(ids)] = torch.from_numpy(trained)
        return row[:-1], row[1:], mask[1:]


class PretrainDataset(TokenRows):
    """{"text"} (or {"content"}) rows: each text is BOS, its tokens, EOS; a long one is split into several rows.

    A text that begins with BOS or ends with EOS written out is not given another one, and EOS directly followed by BOS
    (spaces between them count as nothing) ends a document inside a text, as in MiniMind's files. Other control strings
    in a text are plain text. Rows of one document follow each other and share one token, the last of the one and the
    first of the other: every token but BOS is predicted exactly once.

    `report` counts rows, documents, split (documents longer than a row), tokens, trained_tokens, empty (rows with
    nothing but BOS and EOS), bad_rows (skipped).

    Args:
        cache_dir: folder of the token cache, which serves every max_length; None: tokenise in memory. A source that is
            no file (a name on the hub) is never cached.
        may_be_empty: whether a file without any row is no error.

    Raises:
        ValueError, OSError, BadRow: what `dataset.token_cache.tokenise` raises; no document at all; max_length < 2.
    """

    recipe = PretrainRecipe

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 512,
        on_bad_row: str = "raise",
        cache_dir: str | Path | None = None,
        may_be_empty: bool = False,
    ):
        super().__init__(path, tokenizer, max_length)
        encoded, tally = tokenise(path, tokenizer, PretrainRecipe(), on_bad_row, cache_dir)
        self._layout = split_rows(encoded, max_length)
        self.report = self._layout.report | {"empty": encoded.empty, "bad_rows": tally.skipped.total()}
        if not len(self) and not may_be_empty:
            raise ValueError(self.why_empty())

    def why_empty(self) -> str:
        """Why there is no row, and what to do."""
        empty = self.report["empty"]
        return f"{self.path}: all {empty:,} texts are empty but for BOS and EOS: check how they were written"

    @staticmethod
    def describe(report: dict[str, int], max_length: int) -> str:
        """One line, such as "3,210 rows of 3,005 documents, 411,000 tokens, 17 longer than 512 tokens and split"."""
        return describe_documents(report, max_length)


class PlainTextDataset(TokenRows):
    """Lines of a plain text file, .txt or .txt.gz: each line that is not blank is a document, stripped.

    BOS, EOS and long lines are treated as in `PretrainDataset`. With `concatenate` all documents are joined, each with
    its BOS and EOS, and sliced into rows of max_length tokens that share one token: no padding but in the last row, and
    a row may then begin inside a document and hold several, which attend to each other.

    Args:
        shuffle: put the documents into the order that random.Random(seed) gives, before they are joined.

    `report` has the counts of `PretrainDataset`.

    Raises:
        ValueError, OSError: the file is missing, empty, unreadable. BadRow: a line is not UTF-8, or starts with a BOM.
    """

    def __init__(
        self,
        txt_path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 512,
        shuffle: bool = False,
        concatenate: bool = False,
        seed: int = 42,
    ):
        super().__init__(txt_path, tokenizer, max_length)
        lines, frozen = text_lines(Path(txt_path)), FrozenTokenizer(tokenizer, templates=False)
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        encoded = encode_documents(frozen, chain.from_iterable(split_documents(line, bos, eos) for line in lines))
        lengths = encoded.lengths
        if not len(lengths):
            raise ValueError(f"{txt_path} has no line with text: write one document per line")
        if shuffle:
            order = list(range(len(lengths)))
            random.Random(seed).shuffle(order)
            ends = np.cumsum(lengths)
            ids = np.concatenate([encoded.ids[ends[i] - lengths[i] : ends[i]] for i in order])
            encoded = Encoded(ids, lengths[order])
        layout = self._layout = split_rows(encoded, max_length)
        self.report = layout.report | {"empty": 0, "bad_rows": 0}
        if concatenate:
            layout = self._layout = split_rows(Encoded(encoded.ids, lengths.sum(keepdims=True)), max_length)
            self.report |= {name: layout.report[name] for name in ("rows", "trained_tokens")}

    @staticmethod
    def describe(report: dict[str, int], max_length: int) -> str:
        """One line, like that of `PretrainDataset`."""
        return describe_documents(report, max_length)


class SFTDataset(TokenRows):
    """Conversations ({"conversations"}, {"messages"}, {"input", "output"}), trained on what the assistant says.

    The chat template writes the row and says itself which tokens are a reply or the end marker of one, so no header,
    user's text, tool's answer or forged reply is ever trained. A row keeps its first max_length tokens.

    Args:
        train_on: "all": every reply of the assistant. "last": only the last one. "system": every reply, and the text of
            the system prompt with its end marker (the listing of tools behind it is not trained).
        cache_dir, may_be_empty: as for `PretrainDataset`.

    `report` counts rows, tokens, trained_tokens, cut (rows that were longer than max_length), replies_cut (replies
    whose end marker was cut off), replies_lost (replies of which nothing is left), dropped (rows left out because no
    trained token is left), bad_rows (skipped).

    Raises:
        ValueError, OSError, BadRow: what `dataset.token_cache.tokenise` raises; no row is left; max_length < 2.
    """

    recipe = SFTRecipe
    may_cut = False

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 512,
        on_bad_row: str = "raise",
        train_on: str = "all",
        cache_dir: str | Path | None = None,
        may_be_empty: bool = False,
    ):
        super().__init__(path, tokenizer, max_length)
        encoded, tally = tokenise(path, tokenizer, SFTRecipe(train_on), on_bad_row, cache_dir)
        self._layout = cut_rows(encoded, max_length)
        self.report = self._layout.report | {"bad_rows": tally.skipped.total()}
        if not len(self) and not may_be_empty:
            raise ValueError(self.why_empty())

    def why_empty(self) -> str:
        """Why there is no row, and what to do."""
        return (
            f"{self.path}: none of {self.report['dropped']:,} rows has a reply within {self.max_length} tokens: "
            "raise --max_seq_len, or shorten the prompts"
        )

    @staticmethod
    def describe(report: dict[str, int], max_length: int) -> str:
        """One line, such as "3,210 rows, 411,000 tokens (212,000 trained), 12 cut at 340 tokens, 1 dropped: ..."."""
        parts = [f"{report['rows']:,} rows, {report['tokens']:,} tokens ({report['trained_tokens']:,} trained)"]
        if report["cut"]:
            replies = f"{report['replies_cut']:,} replies without their end, {report['replies_lost']:,} lost"
            parts.append(f"{report['cut']:,} cut at {max_length:,} tokens ({replies})")
        if report["dropped"]:
            parts.append(f"{report['dropped']:,} dropped: no reply left")
        if report["bad_rows"]:
            parts.append(f"{report['bad_rows']:,} bad rows skipped")
        return ", ".join(parts)


def text_lines(path: Path) -> Iterator[str]:
    """Stripped lines of a UTF-8 text file (.gz too) that are not blank."""
    check_file(path)
    with open_bytes(path) as (file, _):
        for number, raw in enumerate(file, start=1):
            try:
                line = decode_line(raw).strip()
            except ValueError as error:
                raise BadRow(str(path), number, str(error)) from error
            if line:
                yield line


def describe_documents(report: dict[str, int], max_length: int) -> str:
    """The line that the counts of documents make."""
    parts = [f"{report['rows']:,} rows of {report['documents']:,} documents, {report['tokens']:,} tokens"]
    if report["split"]:
        parts.append(f"{report['split']:,} longer than {max_length:,} tokens and split")
    for key, words in (("empty", "empty texts left out"), ("bad_rows", "bad rows skipped")):
        if report[key]:
            parts.append(f"{report[key]:,} {words}")
    return ", ".join(parts)
