"""Rows to token ids: what a kind of row becomes, and how the result is laid out in rows of max_length tokens.

A recipe says how rows are read and encoded; it runs in processes of its own, so nothing here imports torch or
transformers. Encoding knows no max_length: what is trained is kept as spans, and cutting, splitting and counting are
done on whole arrays afterwards, the same way for a batch of a stream and for a memory-mapped file of a million rows.

    encoded = SFTRecipe("all").encode(FrozenTokenizer(tokenizer), [(1, messages)], "a.jsonl")
    layout = cut_rows(encoded, max_length=340)       # pretraining: split_rows
    ids, trained, lengths = layout.take([0])
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from types import SimpleNamespace
from typing import ClassVar, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from dataset.jsonl import pretrain_text, trainable_messages
from model.chat import encode_texts, render

TRAIN_ON = ("all", "last", "system")
DOCUMENTS_PER_CHUNK = 1 << 16
TEXTS_PER_BATCH = 64  # the fast tokenizer is quickest on batches, as long as they are small


@dataclass
class Encoded:
    """Documents (pretraining) or conversations as token ids, end to end and not cut to any length.

    ids: uint16, or int32 for a vocabulary of more than 65,536 [N]. lengths: int32 tokens of each document [D].
    spans: int32 first trained token and the one behind the last, counted from the document's start [S, 2], and
    span_counts: int32 how many of them belong to each document [D]; both None where every token is trained.
    hashes: uint64 `content_hashes` of the documents [D], None where `dataset.token_cache` did not read them.
    rows: good rows that this was made of. empty: those of them without any text. bad: (line, reason) of the others.
    """

    ids: np.ndarray
    lengths: np.ndarray
    spans: np.ndarray | None = None
    span_counts: np.ndarray | None = None
    hashes: np.ndarray | None = None
    rows: int = 0
    empty: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)


def splitmix64(numbers: np.ndarray) -> np.ndarray:
    """Each uint64 as another that looks random, one to one: the generator of https://doi.org/10.1145/2714064.2660195."""
    z = numbers + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def content_hashes(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A number for the content of each document, uint64 [D]: evenly spread, and the same for the same token ids.

    splitmix64(sum over t of (id[t] + 1) * w[t] mod 2^64), where w[t] = splitmix64(t) | 1. Two documents that differ
    in one token never share it, any others with a chance of about 2^-64. No protection against forgery.

    Args:
        ids: any integers of at least 0 [N], the documents end to end. lengths: tokens of each [D], N in all.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    weights = splitmix64(np.arange(lengths.max(initial=0), dtype=np.uint64)) | np.uint64(1)
    sums = np.zeros(len(ids) + 1, dtype=np.uint64)
    terms = sums[1:]
    np.add(ids, 1, out=terms, dtype=np.uint64, casting="unsafe")
    terms *= np.concatenate([weights[:0], *(weights[:length] for length in lengths.tolist())])
    np.cumsum(terms, out=terms)
    return splitmix64(sums[ends] - sums[ends - lengths])


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... counts[0] numbers, then those of the next, int64 [counts.sum()]."""
    return np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


class FrozenTokenizer:
    """All that encoding asks of a fast tokenizer, without transformers: loaded in no time, and with a digest.

    Args:
        templates: carry the chat template too; a recipe that renders nothing gives the same digest without it.

    Raises:
        ValueError: the tokenizer is not a fast one.
    """

    is_fast = True

    def __init__(self, tokenizer, templates: bool = True):
        if not tokenizer.is_fast:
            raise ValueError("this needs a fast tokenizer (with a tokenizer.json); the one given has no such file")
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # these are settings of the last call, or differ between versions of transformers; encoding uses none of them
        backend["truncation"] = backend["padding"] = backend["post_processor"] = None
        self._state = {
            "backend": backend,
            "added": [[i, token.content, token.special] for i, token in tokenizer.added_tokens_decoder.items()],
            "size": len(tokenizer),
            "special": dict(tokenizer.special_tokens_map),
            "bos": [tokenizer.bos_token, tokenizer.bos_token_id],
            "eos": [tokenizer.eos_token, tokenizer.eos_token_id],
            "templates": [_template(tokenizer, tools) for tools in (None, [{}])] if templates else None,
        }
        self._unfold()
        self.backend_tokenizer = tokenizer.backend_tokenizer  # the same as from the state, and at hand

    def _unfold(self) -> None:
        state = self._state
        self.bos_token, self.bos_token_id = state["bos"]
        self.eos_token, self.eos_token_id = state["eos"]
        self.special_tokens_map = state["special"]
        self.added_tokens_decoder = {i: SimpleNamespace(content=c, special=s) for i, c, s in state["added"]}

    def __reduce__(self):
        return _thaw, (json.dumps(self._state),)

    def __len__(self) -> int:
        return self._state["size"]

    @cached_property
    def backend_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(json.dumps(self._state["backend"]))

    @property
    def digest(self) -> str:
        """sha256 over everything that could change an id."""
        return hashlib.sha256(json.dumps(self._state, sort_keys=True).encode()).hexdigest()

    @property
    def id_dtype(self) -> type:
        """Two bytes per token where every id of the vocabulary fits."""
        return np.uint16 if len(self) <= 1 << 16 else np.int32

    def get_chat_template(self, chat_template: None = None, tools: Sequence | None = None) -> str:
        template, error = self._state["templates"][tools is not None]
        if template is None:
            raise ValueError(error)
        return template

    def decode(self, ids: list[int], clean_up_tokenization_spaces: bool = False) -> str:
        return self.backend_tokenizer.decode(ids, skip_special_tokens=False)


def _template(tokenizer, tools: list | None) -> tuple[str | None, str | None]:
    """The tokenizer's template with or without tools, or why there is none."""
    try:
        return tokenizer.get_chat_template(tools=tools), None
    except ValueError as error:
        return None, str(error)


def _thaw(state: str) -> FrozenTokenizer:
    tokenizer = FrozenTokenizer.__new__(FrozenTokenizer)
    tokenizer._state = json.loads(state)
    tokenizer._unfold()
    return tokenizer


# --- recipes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainRecipe:
    """{"text"} rows: documents, each between BOS and EOS. Their tokens are all trained."""

    templated: ClassVar[bool] = False

    def read(self, row: dict) -> str:
        return pretrain_text(row)

    def encode(self, tokenizer: FrozenTokenizer, rows: Sequence[tuple[int, str]], path: str) -> Encoded:
        texts, empty = [], 0
        for _, text in rows:
            found = split_documents(text, tokenizer.bos_token, tokenizer.eos_token)
            empty += not found
            texts += found
        encoded = encode_documents(tokenizer, texts)
        encoded.rows, encoded.empty = len(rows), empty
        return encoded


@dataclass(frozen=True)
class SFTRecipe:
    """Conversations, rendered by the chat template; `train_on` as in `SFTDataset`."""

    train_on: str = "all"
    templated: ClassVar[bool] = True

    def __post_init__(self):
        if self.train_on not in TRAIN_ON:
            raise ValueError(f"train_on is {self.train_on!r}: use one of {', '.join(TRAIN_ON)}")

    def read(self, row: dict) -> list[dict]:
        return trainable_messages(row)

    def encode(self, tokenizer: FrozenTokenizer, rows: Sequence[tuple[int, list[dict]]], path: str) -> Encoded:
        ids, lengths, spans, counts = _id_array(tokenizer), array("i"), array("i"), array("i")
        for line, messages in rows:
            try:
                row_ids, found = self._render(tokenizer, messages)
            except ValueError as error:
                raise ValueError(f"{path}:{line}: {error}") from error
            ids.extend(row_ids)
            lengths.append(len(row_ids))
            counts.append(len(found))
            for span in found:
                spans.extend(span)
        columns = [np.asarray(column) for column in (ids, lengths, spans, counts)]
        return Encoded(columns[0], columns[1], columns[2].reshape(-1, 2), columns[3], rows=len(rows))

    def _render(self, tokenizer: FrozenTokenizer, messages: list[dict]) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a row and the spans of those that are trained."""
        tools = [tool for message in messages for tool in message.pop("tools", [])]
        rendered = render(tokenizer, messages, tools=tools or None)
        ids, mask = rendered.input_ids, rendered.assistant_mask
        if self.train_on == "last":
            return ids, runs_of(mask)[-1:]
        if self.train_on == "system" and messages[0]["role"] == "system" and messages[0]["content"]:
            start, end = system_span(tokenizer, ids, messages[0]["content"])
            mask[start:end] = [1] * (end - start)
        return ids, runs_of(mask)


def _id_array(tokenizer: FrozenTokenizer) -> array:
    return array("H" if tokenizer.id_dtype is np.uint16 else "i")


def encode_documents(tokenizer: FrozenTokenizer, texts: Iterable[str]) -> Encoded:
    """Each text with BOS before and EOS behind it."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids, lengths = _id_array(tokenizer), array("i")
    texts = iter(texts)
    with one_thread():
        while batch := list(islice(texts, TEXTS_PER_BATCH)):
            for encoded in encode_texts(tokenizer, batch):
                ids.append(bos)
                ids.extend(encoded)
                ids.append(eos)
                lengths.append(len(encoded) + 2)
    return Encoded(np.asarray(ids), np.asarray(lengths))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let `tokenizers` start no threads: many versions warn about every later fork then, such as a DataLoader's.

    Large files are encoded by several processes instead.
    """
    name = "TOKENIZERS_PARALLELISM"
    if name in os.environ:  # the user has decided
        yield
        return
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]


def split_documents(text: str, bos: str, eos: str) -> list[str]:
    """The documents of a text in which BOS and EOS may be written out, without them; blank ones are left out."""
    begin, end = re.escape(bos), re.escape(eos)
    text = re.sub(rf"\A\s*{begin}", "", text)
    text = re.sub(rf"{end}\s*\Z", "", text)
    # only spaces: a line break between them is how a chat is written, and a chat is one document
    return [document for document in re.split(f"{end} *{begin}", text) if document.strip()]


def runs_of(mask: list[int]) -> list[tuple[int, int]]:
    """(start, end) of each run of ones: of each reply, as a header stands between any two."""
    flags, runs, end = bytes([*mask, 0]), [], 0
    while (start := flags.find(1, end)) >= 0:
        end = flags.find(0, start)
        runs.append((start, end))
    return runs


def system_span(tokenizer: FrozenTokenizer, ids: list[int], content: str) -> tuple[int, int]:
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


# --- rows of max_length tokens ----------------------------------------------------------------------------------------


@dataclass
class Layout:
    """Where rows of at most max_length tokens lie in an `Encoded`. Made by `split_rows` and `cut_rows`.

    starts: first token of each row [R]. lengths: int64 tokens of each row [R]. first_span, span_counts: where its spans
    are [R], None where every token is trained. copies: see `split_rows`. report: counts, see the datasets.
    """

    encoded: Encoded
    max_length: int
    lay_out: Callable[[Encoded, int, np.ndarray | None], Layout]
    copies: np.ndarray | None
    report: dict[str, int]
    starts: np.ndarray
    lengths: np.ndarray
    first_span: np.ndarray | None = None
    span_counts: np.ndarray | None = None

    def __reduce__(self):
        # laid out anew by who receives it: that is quick, and a mapped `encoded` is then but a path
        return self.lay_out, (self.encoded, self.max_length, self.copies)

    def __len__(self) -> int:
        return len(self.lengths)

    def documents(self, indices: Sequence[int] | np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """The documents of which the rows `indices` are, and how many tokens these have in all: int64 [indices]."""
        ends = np.cumsum(self.encoded.lengths, dtype=np.int64)
        numbers = np.searchsorted(ends, self.starts[indices], side="right")
        return numbers, self.encoded.lengths[numbers].astype(np.int64)

    def take(
        self,
        indices: Sequence[int] | np.ndarray,
        offsets: np.ndarray | None = None,
        lengths: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows `indices` end to end: token ids int64 [N], trained bool [N], their lengths int64 [len(indices)].

        With offsets and lengths only so many tokens of each row, from the offset on. A row's first token is not
        trained: nothing in the row predicts it. Raises IndexError.
        """
        indices = np.asarray(indices, dtype=np.int64)
        starts = self.starts[indices].astype(np.int64) + (0 if offsets is None else offsets)
        if lengths is None:
            lengths = self.lengths[indices]
        begins = np.cumsum(lengths) - lengths
        total = int(lengths.sum())
        ids = self.encoded.ids[ranges(starts, lengths)]
        if self.first_span is None:
            trained = np.ones(total, dtype=bool)
        else:
            trained = self._trained(indices, offsets, lengths, begins, total)
        trained[begins] = False
        return ids.astype(np.int64), trained, lengths

    def _trained(self, indices, offsets, lengths: np.ndarray, begins: np.ndarray, total: int) -> np.ndarray:
        counts = self.span_counts[indices]
        spans = self.encoded.spans[ranges(self.first_span[indices].astype(np.int64), counts)]
        if offsets is not None:
            spans = np.maximum(spans - np.repeat(offsets, counts)[:, None], 0)
        edges = np.minimum(spans, np.repeat(lengths, counts)[:, None]) + np.repeat(begins, counts)[:, None]  # [s, 2]
        opened, closed = (np.bincount(edge, minlength=total + 1) for edge in edges.T)
        return np.cumsum(opened - closed)[:total] > 0


def split_rows(encoded: Encoded, max_length: int, copies: np.ndarray | None = None) -> Layout:
    """Rows that share one token where a document is longer than one, so each token but its first is a Y once.

    Args:
        copies: how often each document is there, any integers [D]: 0 leaves it out. None: all of them once.
    """
    return _lay_out(encoded, max_length, copies, split_rows, _split_chunk)


def cut_rows(encoded: Encoded, max_length: int, copies: np.ndarray | None = None) -> Layout:
    """The first max_length tokens of each document; those of which no trained token is left are dropped.

    Args:
        copies: as for `split_rows`.
    """
    return _lay_out(encoded, max_length, copies, cut_rows, _cut_chunk)


def _lay_out(
    encoded: Encoded, max_length: int, copies: np.ndarray | None, lay_out: Callable, chunk: Callable
) -> Layout:
    # an index takes four bytes where that is enough
    small = np.uint32 if len(encoded.ids) < 1 << 32 else np.int64
    kinds = [small, np.int64, small, np.int32]  # there are fewer spans than tokens
    columns: list[list[np.ndarray]] = [[] for _ in kinds]
    report = Counter()
    for documents in _chunks(encoded, copies):
        of_rows, found = chunk(documents, max_length)
        for column, values, kind in zip(columns, of_rows, kinds, strict=False):
            column.append(values.astype(kind))
        report.update(found)
    joined = [np.concatenate(column) for column in columns if column]
    return Layout(encoded, max_length, lay_out, copies, dict(report), *joined)


class _Documents(NamedTuple):
    """Some documents: starts, lengths in tokens, first_span, span_counts int64 [D]; all their spans [S, 2]."""

    starts: np.ndarray
    lengths: np.ndarray
    first_span: np.ndarray | None = None
    span_counts: np.ndarray | None = None
    spans: np.ndarray | None = None


def _chunks(encoded: Encoded, copies: np.ndarray | None) -> Iterator[_Documents]:
    """Chunk after chunk: on all documents at once, what is in between would take more memory than the result."""
    token = span = 0
    for at in range(0, max(len(encoded.lengths), 1), DOCUMENTS_PER_CHUNK):
        here = slice(at, at + DOCUMENTS_PER_CHUNK)
        lengths = encoded.lengths[here].astype(np.int64)
        columns = [token + np.cumsum(lengths) - lengths, lengths]
        token += int(lengths.sum())
        spans = None
        if encoded.span_counts is not None:
            counts = encoded.span_counts[here].astype(np.int64)
            columns += [span + np.cumsum(counts) - counts, counts]
            spans = encoded.spans[span : span + int(counts.sum())]
        if copies is not None:
            columns = [np.repeat(column, copies[here]) for column in columns]
            if spans is not None:
                spans = spans[ranges(columns[2] - span, columns[3])]
        span += 0 if spans is None else int(counts.sum())
        yield _Documents(*columns, *([] if spans is None else [spans]))


def _split_chunk(documents: _Documents, max_length: int) -> tuple[tuple, dict[str, int]]:
    stride, lengths = max_length - 1, documents.lengths
    rows = -(-(lengths - 1) // stride)  # [D]
    offset = ranges(np.zeros_like(rows), rows) * stride  # [R] from the document's start
    row_lengths = np.minimum(np.repeat(lengths, rows) - offset, max_length)
    report = {
        "rows": len(row_lengths),
        "documents": len(lengths),
        "split": int((lengths > max_length).sum()),
        "tokens": int(lengths.sum()),
        "trained_tokens": int((row_lengths - 1).sum()),
    }
    return (np.repeat(documents.starts, rows) + offset, row_lengths), report


def _cut_chunk(documents: _Documents, max_length: int) -> tuple[tuple, dict[str, int]]:
    starts, whole, first_span, counts, spans = documents
    lengths = np.minimum(whole, max_length)
    last = np.cumsum(counts)
    begin, end = spans.T  # [S]
    limit = np.repeat(lengths, counts)
    totals = np.cumsum(np.append(0, np.clip(end, 1, limit) - np.clip(begin, 1, limit)))  # a row's first is no Y
    trained = totals[last] - totals[last - counts]  # [D]
    kept = np.flatnonzero(trained)
    report = {
        "rows": len(kept),
        "tokens": int(lengths[kept].sum()),
        "trained_tokens": int(trained.sum()),
        "cut": int((whole > max_length).sum()),
        "replies_cut": int(((begin < max_length) & (end > max_length)).sum()),
        "replies_lost": int((begin >= max_length).sum()),
        "dropped": len(whole) - len(kept),  # a batch of such rows has no loss to divide
    }
    return (starts[kept], lengths[kept], first_span[kept], counts[kept]), report
