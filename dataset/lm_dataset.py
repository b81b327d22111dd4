"""The datasets of pretraining and supervised fine-tuning: a file becomes (X, Y, loss_mask) rows of token ids.

Everything is tokenised once, when the dataset is made, into flat arrays of two bytes per token (one more for a mask),
so an epoch costs no tokenising and workers share the memory. Nothing is lost silently: long texts are split into rows,
and what does not fit into a conversation's row is counted in `report` and said by `summary()`.

    tokenizer = AutoTokenizer.from_pretrained("model")
    dataset = PretrainDataset("dataset/pretrain_hq.jsonl", tokenizer, max_length=512)
    dataset = PlainTextDataset("my.txt", tokenizer, max_length=512, concatenate=True)
    dataset = SFTDataset("dataset/sft_mini_512.jsonl", tokenizer, max_length=340)
    X, Y, loss_mask = dataset[0]                     # int64 [max_length - 1] each; loss_mask[i] is for Y[i]
    print(dataset.summary())
"""

from __future__ import annotations

import os
import random
import re
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dataset.jsonl import (
    BadRow,
    RowReader,
    check_conversation,
    check_file,
    check_pretrain,
    decode_line,
    open_bytes,
    pretrain_text,
    read_rows,
    to_messages,
)
from model.chat import encode_texts, render

TEXTS_PER_BATCH = 1000  # the fast tokenizer works on a batch at once
TRAIN_ON = ("all", "last", "system")


class TokenRows(Dataset):
    """Rows of token ids, kept end to end in one array.

    Item i is (X, Y, loss_mask), int64 tensors [max_length - 1]: the row padded on the right with pad_token_id to
    max_length, without its last token (X) and without its first (Y); loss_mask is 1 where Y is trained, 0 on pads.

    Attributes:
        report: counts, see the datasets. lengths: int64 [rows], tokens of each row before padding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}: a row needs at least 2 tokens, one to predict another")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"the tokenizer has no {name}: use one that has, such as the repository's `model`")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.report: dict[str, int] = {}
        self._ids, self._mask = np.empty(0, np.uint16), None  # [N] token ids; [N] 0/1, None where all are trained
        self._starts = self.lengths = np.empty(0, np.int64)  # [R]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        start, length = self._starts[index], self.lengths[index]
        row = torch.full((self.max_length,), self.tokenizer.pad_token_id)
        row[:length] = torch.from_numpy(self._ids[start : start + length].astype(np.int64))
        mask = torch.zeros(self.max_length, dtype=torch.int64)
        if self._mask is None:
            mask[:length] = 1
        else:
            mask[:length] = torch.from_numpy(self._mask[start : start + length].astype(np.int64))
        return row[:-1], row[1:], mask[1:]

    def _new_ids(self) -> array:
        """An array of token ids to append to: two bytes each where every id of the vocabulary fits."""
        return array("H" if len(self.tokenizer) <= 1 << 16 else "i")

    def _encode(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all documents, end to end, each with BOS and EOS [N], and the documents' lengths [D]."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids, lengths = self._new_ids(), array("q")
        texts = iter(texts)
        while batch := list(islice(texts, TEXTS_PER_BATCH)):
            for encoded in encode_texts(self.tokenizer, batch):
                ids.append(bos)
                ids.extend(encoded)
                ids.append(eos)
                lengths.append(len(encoded) + 2)
        return as_numpy(ids), as_numpy(lengths)

    def _split(self, lengths: np.ndarray) -> None:
        """Cut documents of these lengths into rows that share one token, so each token but the first is a Y once."""
        stride = self.max_length - 1
        rows = -(-(lengths - 1) // stride)  # [D]
        first_row, first_token = np.cumsum(rows) - rows, np.cumsum(lengths) - lengths
        offset = (np.arange(rows.sum()) - np.repeat(first_row, rows)) * stride  # [R] from the document's first token
        self._starts = np.repeat(first_token, rows) + offset
        self.lengths = np.minimum(np.repeat(lengths, rows) - offset, self.max_length)


class PretrainDataset(TokenRows):
    """{"text"} (or {"content"}) rows: each text is BOS, its tokens, EOS; a long one is split into several rows.

    A text that begins with BOS or ends with EOS written out is not given another one, and EOS directly followed by BOS
    (spaces between them count as nothing) ends a document inside a text, as in MiniMind's files. Other control strings
    in a text are plain text. Rows of one document follow each other and share one token, the last of the one and the
    first of the other: every token but BOS is predicted exactly once.

    `report` counts rows, documents, split (documents longer than a row), tokens, trained_tokens, empty (rows with
    nothing but BOS and EOS), bad_rows (skipped).

    Raises:
        ValueError, OSError, BadRow: what `dataset.jsonl.read_rows` raises; no document at all; max_length < 2.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 512,
        on_bad_row: str = "raise",
    ):
        super().__init__(tokenizer, max_length)
        reader = read_rows(path, on_bad_row, check_pretrain)
        empty = 0

        def documents() -> Iterator[str]:
            nonlocal empty
            for _, row in with_progress(reader):
                found = split_documents(pretrain_text(row), tokenizer.bos_token, tokenizer.eos_token)
                empty += not found
                yield from found

        self._ids, lengths = self._encode(documents())
        if not len(lengths):
            raise ValueError(f"{path}: all {empty:,} texts are empty but for BOS and EOS: check how they were written")
        self._split(lengths)
        self.report = report_of_documents(self, lengths) | {"empty": empty, "bad_rows": reader.skipped.total()}

    def summary(self) -> str:
        """One line, such as "3,210 rows of 3,005 documents, 411,000 tokens, 17 longer than 512 tokens and split"."""
        return summary_of_documents(self)


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
        super().__init__(tokenizer, max_length)
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        lines = text_lines(Path(txt_path))
        self._ids, lengths = self._encode(chain.from_iterable(split_documents(line, bos, eos) for line in lines))
        if not len(lengths):
            raise ValueError(f"{txt_path} has no line with text: write one document per line")
        if shuffle:
            order = list(range(len(lengths)))
            random.Random(seed).shuffle(order)
            ends = np.cumsum(lengths)
            self._ids = np.concatenate([self._ids[ends[i] - lengths[i] : ends[i]] for i in order])
            lengths = lengths[order]
        self._split(lengths.sum(keepdims=True) if concatenate else lengths)
        self.report = report_of_documents(self, lengths) | {"empty": 0, "bad_rows": 0}

    def summary(self) -> str:
        """One line, like that of `PretrainDataset`."""
        return summary_of_documents(self)


class SFTDataset(TokenRows):
    """Conversations ({"conversations"}, {"messages"}, {"input", "output"}), trained on what the assistant says.

    The chat template writes the row and says itself which tokens are a reply or the end marker of one, so no header,
    user's text, tool's answer or forged reply is ever trained. A row keeps its first max_length tokens.

    Args:
        train_on: "all": every reply of the assistant. "last": only the last one. "system": every reply, and the text of
            the system prompt with its end marker (the listing of tools behind it is not trained).

    `report` counts rows, tokens, trained_tokens, cut (rows that were longer than max_length), replies_cut (replies
    whose end marker was cut off), replies_lost (replies of which nothing is left), dropped (rows left out because no
    trained token is left), bad_rows (skipped).

    Raises:
        ValueError, OSError, BadRow: what `dataset.jsonl.read_rows` raises; no row is left; max_length < 2.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 512,
        on_bad_row: str = "raise",
        train_on: str = "all",
    ):
        super().__init__(tokenizer, max_length)
        if train_on not in TRAIN_ON:
            raise ValueError(f"train_on is {train_on!r}: use one of {', '.join(TRAIN_ON)}")
        reader = read_rows(path, on_bad_row, check_conversation)
        counts = dict.fromkeys(("cut", "replies_cut", "replies_lost", "dropped"), 0)
        ids, trained, lengths = self._new_ids(), bytearray(), array("q")
        for line, row in with_progress(reader):
            row_ids, mask = self._render(row, train_on, f"{path}:{line}")
            if len(mask) > max_length:
                count_cut(mask, max_length, counts)
            mask = mask[:max_length]
            if not any(mask[1:]):  # a batch of such rows has no loss to divide
                counts["dropped"] += 1
                continue
            ids.extend(row_ids[:max_length])
            trained.extend(mask)
            lengths.append(len(mask))
        if not lengths:
            raise ValueError(
                f"{path}: none of {counts['dropped']:,} rows has a reply within {max_length} tokens: "
                "raise --max_seq_len, or shorten the prompts"
            )
        self._ids, self._mask, self.lengths = as_numpy(ids), np.frombuffer(trained, np.uint8), as_numpy(lengths)
        self._starts = np.cumsum(self.lengths) - self.lengths
        trained_tokens = int(self._mask.sum()) - int(self._mask[self._starts].sum())  # a row's first token is no Y
        size = {"rows": len(self), "tokens": len(self._ids), "trained_tokens": trained_tokens}
        self.report = size | counts | {"bad_rows": reader.skipped.total()}

    def _render(self, row: dict, train_on: str, place: str) -> tuple[list[int], list[int]]:
        """Token ids of a row and the 0/1 mask of those that are trained."""
        messages = to_messages(row)
        tools = [tool for message in messages for tool in message.pop("tools", [])]
        try:
            rendered = render(self.tokenizer, messages, tools=tools or None)
            ids, mask = rendered.input_ids, rendered.assistant_mask
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if train_on == "last":
            last = runs_of(mask)[-1:]
            mask = [int(start <= i < end) for start, end in last for i in range(len(mask))]
        elif train_on == "system" and messages[0]["role"] == "system" and messages[0]["content"]:
            start, end = system_span(self.tokenizer, ids, messages[0]["content"])
            mask = mask[:start] + [1] * (end - start) + mask[end:]
        return ids, mask

    def summary(self) -> str:
        """One line, such as "3,210 rows, 411,000 tokens (212,000 trained), 12 cut at 340 tokens, 1 dropped: ..."."""
        report = self.report
        parts = [f"{report['rows']:,} rows, {report['tokens']:,} tokens ({report['trained_tokens']:,} trained)"]
        if report["cut"]:
            replies = f"{report['replies_cut']:,} replies without their end, {report['replies_lost']:,} lost"
            parts.append(f"{report['cut']:,} cut at {self.max_length:,} tokens ({replies})")
        if report["dropped"]:
            parts.append(f"{report['dropped']:,} dropped: no reply left")
        if report["bad_rows"]:
            parts.append(f"{report['bad_rows']:,} bad rows skipped")
        return ", ".join(parts)


def as_numpy(values: array) -> np.ndarray:
    """The memory of an array, not a copy of it."""
    return np.asarray(values)


def with_progress(reader: RowReader) -> Iterator[tuple[int, dict]]:
    """The rows of `reader`, with a progress bar on a terminal's stderr when it takes more than two seconds."""
    quiet = True if os.environ.get("RANK", "0") != "0" else None  # None: not where stderr is a file
    looks = {"total": reader.size, "unit": "B", "unit_scale": True} if reader.size else {"unit": " rows"}
    with tqdm(desc=Path(reader.path).name, disable=quiet, delay=2, leave=False, **looks) as bar:
        for item in reader:
            yield item
            if reader.rows % 256 == 0:
                bar.update((reader.position if reader.size else reader.rows) - bar.n)


def split_documents(text: str, bos: str, eos: str) -> list[str]:
    """The documents of a text in which BOS and EOS may be written out, without them; blank ones are left out."""
    begin, end = re.escape(bos), re.escape(eos)
    text = re.sub(rf"\A\s*{begin}", "", text)
    text = re.sub(rf"{end}\s*\Z", "", text)
    # only spaces: a line break between them is how a chat is written, and a chat is one document
    return [document for document in re.split(f"{end} *{begin}", text) if document.strip()]


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


def report_of_documents(dataset: TokenRows, lengths: np.ndarray) -> dict[str, int]:
    """Counts of a dataset whose every token after a row's first is trained."""
    return {
        "rows": len(dataset),
        "documents": len(lengths),
        "split": int((lengths > dataset.max_length).sum()),
        "tokens": int(lengths.sum()),
        "trained_tokens": int((dataset.lengths - 1).sum()),
    }


def summary_of_documents(dataset: TokenRows) -> str:
    """The line that `report_of_documents` makes."""
    report = dataset.report
    parts = [f"{report['rows']:,} rows of {report['documents']:,} documents, {report['tokens']:,} tokens"]
    if report["split"]:
        parts.append(f"{report['split']:,} longer than {dataset.max_length:,} tokens and split")
    for key, words in (("empty", "empty texts left out"), ("bad_rows", "bad rows skipped")):
        if report[key]:
            parts.append(f"{report[key]:,} {words}")
    return ", ".join(parts)


def runs_of(mask: list[int]) -> list[tuple[int, int]]:
    """(start, end) of each run of ones: of each reply, as a header stands between any two."""
    edges = np.flatnonzero(np.diff(np.array([0, *mask, 0], dtype=np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def count_cut(mask: list[int], max_length: int, counts: dict[str, int]) -> None:
    """Count what is lost when a longer row keeps its first `max_length` tokens."""
    counts["cut"] += 1
    for start, end in runs_of(mask):
        counts["replies_cut"] += start < max_length < end
        counts["replies_lost"] += start >= max_length


def system_span(tokenizer: PreTrainedTokenizerBase, ids: list[int], content: str) -> tuple[int, int]:
    """(start, end) of the tokens of the system prompt `content` at the beginning of a rendered row.

    Found by decoding, as a token may hold the end of the header together with the beginning of the text; such a token
    is not trained. The end marker is within the span if it follows directly.
    """
    stop = ids.index(tokenizer.eos_token_id)

    def tokens_until(text: str) -> int:
        """How many tokens it takes to write the role and `text` (bisection: more tokens never write less)."""
        low, high = 1, stop
        while low < high:
            middle = (low + high) // 2
            written = tokenizer.decode(ids[1:middle], clean_up_tokenization_spaces=False)
            low, high = (low, middle) if written.startswith(text) else (middle + 1, high)
        return low

    start, end = tokens_until("system\n"), tokens_until("system\n" + content)
    return start, end + (end == stop)
