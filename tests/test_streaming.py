"""Streams: each pass holds every document once, in any window, and processes share it without loss."""

import json

import numpy as np
import pytest

from dataset import streaming
from dataset.encode import PretrainRecipe, SFTRecipe
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.packing import Rows
from dataset.streaming import StreamedRows
from trainer.trainer_utils import SkipBatchSampler, StreamShare


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"number {i} " + "word " * (i * 7 % 60)}) for i in range(120)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def documents_of(rows):
    """Each document of the rows as (ids, trained)."""
    found = []
    for ids, trained, lengths in rows:
        cuts = np.cumsum(lengths)[:-1]
        found += [(tuple(a), tuple(b)) for a, b in zip(np.split(ids, cuts), np.split(trained, cuts), strict=True)]
    return found


def first_rows(stream, count):
    stream.length = count
    return list(stream)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("window", [1, 1500, 1 << 21])  # a window for each batch of lines, some, one
def test_a_pass_holds_every_document_once(texts, tokenizer, window, packing, monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW_TOKENS", window)
    dataset = PretrainDataset(texts, tokenizer, 40)
    wanted = documents_of([dataset.take([i]) for i in range(len(dataset))])
    stream = StreamedRows(texts, tokenizer, PretrainRecipe(), 40, 10_000, packing)
    found, rows = [], iter(stream)
    while len(found) < len(wanted):
        found += documents_of([next(rows)])
    assert sorted(found) == sorted(wanted)


def test_it_goes_on_in_another_order_and_ends_at_its_length(texts, tokenizer):
    stream = StreamedRows(texts, tokenizer, PretrainRecipe(), 64, 1)
    rows = len(Rows(PretrainDataset(texts, tokenizer, 64)))
    twice = first_rows(stream, 2 * rows)
    assert len(twice) == len(stream) == 2 * rows
    once, again = documents_of(twice[:rows]), documents_of(twice[rows:])
    assert sorted(once) == sorted(again) and once != again
    assert documents_of(first_rows(stream, 2 * rows)) == once + again  # and the same when read anew


def test_conversations_are_cut_and_masked_as_in_the_dataset(tmp_path, tokenizer):
    path = tmp_path / "chat.jsonl"
    rows = [{"input": f"question {i}", "output": "answer " * i} for i in range(1, 40)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    dataset = SFTDataset(path, tokenizer, 50)
    wanted = documents_of([dataset.take([i]) for i in range(len(dataset))])
    stream = StreamedRows(path, tokenizer, SFTRecipe("all"), 50, len(Rows(dataset)))
    assert sorted(documents_of(stream)) == sorted(wanted) and any(any(trained) for _, trained in wanted)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("skip", [0, 2])
def test_processes_share_every_row_and_a_resume_goes_on_where_it_was(texts, tokenizer, world_size, skip):
    stream = StreamedRows(texts, tokenizer, PretrainRecipe(), 64, 24)
    everything = [documents_of([row]) for row in stream]
    parts = [
        list(StreamShare(stream, SkipBatchSampler(range(24), 2, skip, rank, world_size))) for rank in range(world_size)
    ]
    assert {len(part) for part in parts} == {24 // (2 * world_size) - skip}
    together = [documents_of([row]) for step in zip(*parts, strict=True) for batch in step for row in batch]
    assert together == everything[skip * 2 * world_size :]


def test_a_source_without_a_trained_token_is_refused(tmp_path, tokenizer):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"input": "a " * 100, "output": "b"}), encoding="utf-8")
    with pytest.raises(ValueError, match="no row has a token to train on within 20 tokens"):
        next(iter(StreamedRows(path, tokenizer, SFTRecipe("all"), 20, 5)))
