"""Several files as one: what is held back goes by content, what is kept is exact, and what is said of it is true.

python -m pytest tests/test_sources.py
"""

import json
import pickle
import random
import types
from collections import Counter

import numpy as np
import pytest

from dataset import token_cache
from dataset.encode import Encoded, PretrainRecipe, SFTRecipe, content_hashes, cut_rows, split_rows
from dataset.jsonl import read_rows
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.packing import Rows
from dataset.sources import MixedRows, Sampling, held_back, read_sampling, sampled_copies, split_source
from dataset.token_cache import encoded_batches, tokenise
from trainer import rows as trainer_rows
from trainer.rows import open_rows

KINDS = {"pretrain": (PretrainDataset, PretrainRecipe()), "sft": (SFTDataset, SFTRecipe())}
WORDS = ["你好", "the quick fox", "四 五", "1234", "🙂", "猫 "]


def a_row(rng):
    text = "".join(rng.choices(WORDS, k=rng.randint(1, 40))) + str(rng.random())
    messages = [{"role": "user", "content": text[-12:]}, {"role": "assistant", "content": text[:150]}]
    return {"text": text, "conversations": messages}


def some_rows(count, seed=0):
    rng = random.Random(seed)
    return [a_row(rng) for _ in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    return str(path)


def bag(rows):
    """How often each document is among the rows: {(ids, trained): times}."""
    ids, trained, lengths = rows.take(np.arange(len(rows)))
    cuts = np.cumsum(lengths)[:-1]
    pieces = zip(np.split(ids, cuts), np.split(trained, cuts), strict=True)
    return Counter((tuple(a.tolist()), tuple(b.tolist())) for a, b in pieces)


def arguments(*data_path, **changed):
    """What `open_rows` reads of the flags."""
    flags = {"max_seq_len": 512, "on_bad_row": "raise", "cache_dir": None, "packing": 0, "seed": 42, "streaming": 0}
    flags |= {"sampling": None, "sample_ratio": 1.0, "val_ratio": 0.0, "val_path": None, "max_steps": 0}
    flags |= {"accumulation_steps": 1, "batch_size": 2, "data_path": list(map(str, data_path))}
    return types.SimpleNamespace(**flags | changed)


@pytest.fixture
def said(monkeypatch):
    """The lines that are logged."""
    lines = []
    monkeypatch.setattr(trainer_rows, "Logger", lines.append)
    return lines


def warnings_of(said):
    return [line for line in said if line.startswith(("warning", "note"))]


# --- hashes -----------------------------------------------------------------------------------------------------------


def naive_hash(ids):
    """The formula, one Python integer after the other."""

    def mix(z):
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    return mix(sum((token + 1) * (mix(t) | 1) for t, token in enumerate(ids)) % 2**64)


def test_hashes_equal_the_formula_wherever_a_document_lies():
    rng = random.Random(0)
    documents = [[rng.randrange(6400) for _ in range(rng.choice([0, 1, 2, 7, 300]))] for _ in range(50)]
    for dtype in (np.uint16, np.int32):
        for order in (documents, documents[::-1], documents[3:5]):
            flat = np.array([token for document in order for token in document], dtype=dtype)
            found = content_hashes(flat, np.array(list(map(len, order)), np.int32))
            assert found.dtype == np.uint64 and found.tolist() == list(map(naive_hash, order))
    assert content_hashes(np.empty(0, np.uint16), np.empty(0, np.int32)).tolist() == []


def test_near_documents_have_other_hashes_that_are_spread_evenly():
    base = [5, 6, 7, 0]
    near = [base, base[:-1], [*base, 0], [0, *base], [6, 5, 7, 0], [5, 6, 7, 1], [6, 6, 6, 0], [0], [0, 0], []]
    assert len(set(map(naive_hash, near))) == len(near)
    ids = np.repeat(np.arange(20_000, dtype=np.int32), 3)  # documents that count up: 0 0 0, 1 1 1, ...
    hashes = content_hashes(ids, np.full(20_000, 3, np.int32))
    for bits in (60, 0):
        counts = np.bincount((hashes >> np.uint64(bits)).astype(np.int64) % 16, minlength=16)
        assert abs(counts - 1250).max() < 5 * 1250**0.5


@pytest.mark.parametrize("kind, recipe", KINDS.values(), ids=KINDS)
def test_hashes_are_the_same_from_memory_cache_processes_and_a_stream(tmp_path, tokenizer, kind, recipe, monkeypatch):
    path = write(tmp_path / "a.jsonl", some_rows(60))
    expected = kind(path, tokenizer).hashes
    encoded, _ = tokenise(path, tokenizer, recipe)
    ends = np.cumsum(encoded.lengths)
    documents = [encoded.ids[end - n : end].tolist() for end, n in zip(ends, encoded.lengths, strict=True)]
    assert expected.tolist() == list(map(naive_hash, documents)) and len(expected) == 60
    for _ in range(2):  # built, and opened
        assert np.array_equal(kind(path, tokenizer, 16, cache_dir=tmp_path / "cache").hashes, expected)
    monkeypatch.setattr(token_cache, "BATCH_BYTES", 2048)
    for workers in (0, 2):
        batches = list(encoded_batches(read_rows(path), tokenizer, recipe, workers))
        assert len(batches) > 3 and np.array_equal(np.concatenate([batch.hashes for batch in batches]), expected)


def test_a_cache_of_another_format_is_built_again(tmp_path, tokenizer, monkeypatch):
    path, cache = write(tmp_path / "a.jsonl", some_rows(5)), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "FORMAT", token_cache.FORMAT - 1)
        PretrainDataset(path, tokenizer, cache_dir=cache)
    assert len(list(cache.glob("*.json"))) == 1
    assert len(PretrainDataset(path, tokenizer, cache_dir=cache).hashes) == 5
    assert len(list(cache.glob("*.json"))) == 2
    for record in cache.glob("*.json"):  # as if a record of another format had got the name of this one
        text = record.read_text(encoding="utf-8")
        record.write_text(text.replace(f'"format": {token_cache.FORMAT}', '"format": 0'), encoding="utf-8")
    assert len(PretrainDataset(path, tokenizer, cache_dir=cache).hashes) == 5
    formats = [json.loads(record.read_text(encoding="utf-8"))["format"] for record in cache.glob("*.json")]
    assert sorted(formats) == [token_cache.FORMAT - 1, token_cache.FORMAT]


# --- choosing documents -----------------------------------------------------------------------------------------------


def encoded_by_hand():
    """Four conversations of 4, 6, 3 and 2 tokens; the third has no trained token, the second two replies."""
    lengths, counts = np.array([4, 6, 3, 2], np.int32), np.array([1, 2, 0, 1], np.int32)
    spans = np.array([[2, 4], [1, 3], [4, 6], [1, 2]], np.int32)
    return Encoded(np.arange(15, dtype=np.uint16), lengths, spans, counts)


def test_copies_worked_by_hand():
    encoded = encoded_by_hand()
    rows = cut_rows(encoded, 4, np.array([0, 2, 1, 1]))
    ids, trained, lengths = rows.take(range(len(rows)))
    assert lengths.tolist() == [4, 4, 2] and ids.tolist() == [4, 5, 6, 7, 4, 5, 6, 7, 13, 14]
    assert trained.tolist() == [0, 1, 1, 0, 0, 1, 1, 0, 0, 1]
    assert rows.report == {
        "rows": 3,
        "tokens": 10,
        "trained_tokens": 5,
        "cut": 2,
        "replies_cut": 0,
        "replies_lost": 2,
        "dropped": 1,
    }
    assert [column.tolist() for column in rows.documents([0, 1, 2])] == [[1, 1, 3], [6, 6, 2]]
    rows = split_rows(encoded, 4, np.array([1, 2, 0, 0]))
    ids, trained, lengths = rows.take(range(len(rows)))
    assert ids.tolist() == [0, 1, 2, 3, *[4, 5, 6, 7, 7, 8, 9] * 2] and lengths.tolist() == [4, 4, 3, 4, 3]
    assert rows.report == {"rows": 5, "documents": 3, "split": 2, "tokens": 16, "trained_tokens": 13}
    assert [column.tolist() for column in rows.documents(slice(None))] == [[0, 1, 1, 1, 1], [4, 6, 6, 6, 6]]
    for lay_out in (cut_rows, split_rows):
        none = lay_out(encoded, 4, np.zeros(4, int))
        assert len(none) == 0 and not any(none.report.values())


@pytest.mark.parametrize("chunk", [7, 1 << 16])
@pytest.mark.parametrize("kind", [PretrainDataset, SFTDataset])
def test_chosen_documents_are_those_of_a_file_with_these_rows(tmp_path, tokenizer, kind, chunk, monkeypatch):
    monkeypatch.setattr("dataset.encode.DOCUMENTS_PER_CHUNK", chunk)
    rows, rng = some_rows(60), random.Random(1)
    copies = np.array(rng.choices([0, 1, 2, 5], k=60))
    whole = kind(write(tmp_path / "all.jsonl", rows), tokenizer, 40)
    written = [row for row, times in zip(rows, copies, strict=True) for _ in range(times)]
    expected = kind(write(tmp_path / "some.jsonl", written), tokenizer, 40)
    chosen = whole.choose(copies)
    assert chosen.report == expected.report and chosen.summary() == expected.summary()
    for ours, theirs in zip(*(rows.take(range(len(rows))) for rows in (chosen, expected)), strict=True):
        assert np.array_equal(ours, theirs)
    assert len(whole) != len(chosen) and np.array_equal(whole.hashes, chosen.hashes)
    again = pickle.loads(pickle.dumps(chosen))
    assert bag(again) == bag(chosen) and again.report == chosen.report
    with pytest.raises(ValueError, match="has 60 documents, but copies are for 59"):
        whole.choose(copies[1:])


# --- what is held back ------------------------------------------------------------------------------------------------


def test_the_split_worked_by_hand():
    quarter = 1 << 62
    hashes = np.array([0, quarter - 1, quarter, 2 * quarter, 2**64 - 1], np.uint64)
    assert held_back(hashes, 0.25).tolist() == [True, True, False, False, False]
    assert held_back(hashes, 0.0).tolist() == [False] * 5
    assert held_back(hashes, 1 - 2**-53).tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("kind", [PretrainDataset, SFTDataset])
def test_no_order_seed_copy_or_other_file_moves_a_document(tmp_path, tokenizer, kind):
    rows, other = some_rows(120), some_rows(30, seed=9)

    def split(rows, seed=42):
        data = kind(write(tmp_path / "a.jsonl", rows), tokenizer, 40)
        source = split_source("a.jsonl", data, Sampling(val_ratio=0.3), seed)
        return bag(source.train), bag(source.held_back), bag(data)

    train, val, everything = split(rows)
    assert train + val == everything and not train.keys() & val.keys() and 15 < val.total() < train.total()
    random.Random(3).shuffle(rows)
    assert split(rows, seed=1) == (train, val, everything)
    more_train, more_val, _ = split([*other, *rows, *rows])
    assert not more_train.keys() & more_val.keys()
    assert set(train) <= set(more_train) and set(val) <= set(more_val)
    assert all(more_train[row] == 2 * times for row, times in train.items())


def test_a_larger_val_ratio_holds_back_more(tmp_path, tokenizer):
    hashes = np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64)
    small, large = held_back(hashes, 0.01), held_back(hashes, 0.05)
    assert 60 < small.sum() < 140 and 400 < large.sum() < 600 and not (small & ~large).any()


def test_one_document_may_be_held_back_alone_and_must_not_be_all(tmp_path, tokenizer, said):
    path = write(tmp_path / "one.jsonl", some_rows(1))
    ratio = int(PretrainDataset(path, tokenizer).hashes[0]) / 2**64
    train, val, _ = open_rows(arguments(path, val_ratio=ratio * 0.99, val_path=[path]), tokenizer, PretrainDataset)
    assert len(train) == 1 and len(val) == 1
    more = write(tmp_path / "more.jsonl", [*some_rows(1), *some_rows(3, seed=4)])
    hashes = PretrainDataset(more, tokenizer).hashes
    least = float(np.sort(hashes)[0]) / 2**64
    train, val, _ = open_rows(arguments(more, val_ratio=least * 1.01), tokenizer, PretrainDataset)
    assert (len(train), len(val)) == (3, 1)
    with pytest.raises(ValueError, match=r"of its 1 documents 1 are held back.*: raise the ratio, or lower the val_"):
        open_rows(arguments(path, val_ratio=min(ratio * 1.01, 0.999)), tokenizer, PretrainDataset)
    with pytest.raises(ValueError, match="of 1 documents none that can be used is held back: raise --val_ratio"):
        open_rows(arguments(path, val_ratio=ratio * 0.99), tokenizer, PretrainDataset)


# --- how much is kept -------------------------------------------------------------------------------------------------

HASHES = np.random.default_rng(5).integers(0, 2**64, 1000, dtype=np.uint64)


@pytest.mark.parametrize("ratio", [0.0001, 0.0005, 0.1, 0.3337, 0.5, 0.999, 1, 1.0005, 1.5, 2, 3.25])
@pytest.mark.parametrize("limit", [None, 3, 700, 1200])
@pytest.mark.parametrize("val_ratio", [0.0, 0.2])
def test_the_count_is_exact(ratio, limit, val_ratio):
    held = held_back(HASHES, val_ratio)
    left = 1000 - int(held.sum())
    copies = sampled_copies(HASHES, Sampling(ratio, limit, val_ratio), seed=42)
    wanted = round(ratio * left) if limit is None else min(round(ratio * left), limit)
    assert copies.sum() == wanted and not copies[held].any()
    assert set(copies[~held].tolist()) <= {wanted // left, wanted // left + 1}


def test_a_larger_ratio_is_the_smaller_one_and_more_in_any_order():
    def kept(ratio, seed=42, order=slice(None)):
        copies = sampled_copies(HASHES[order], Sampling(ratio), seed)
        return Counter(np.repeat(HASHES[order], copies).tolist())

    ratios = [0.01, 0.1, 0.11, 0.5, 1, 1.2, 2, 2.7]
    for small, large in zip(ratios, ratios[1:], strict=False):
        assert kept(small) < kept(large)
    shuffled = np.random.default_rng(1).permutation(1000)
    assert all(kept(ratio, order=shuffled) == kept(ratio) for ratio in ratios)
    both = (kept(0.5) & kept(0.5, seed=43)).total()
    assert 200 < both < 300  # two seeds choose independently
    assert kept(0.3, seed=-1) == kept(0.3, seed=-1) != kept(0.3)


def test_of_equal_documents_so_many_are_taken_as_are_wanted():
    hashes = np.repeat(HASHES[:3], 10)
    for count in range(31):
        copies = sampled_copies(hashes, Sampling(max_samples=count), seed=42)
        assert copies.sum() == count and copies.max(initial=0) <= 1
        of_each = sorted(copies.reshape(3, 10).sum(axis=1).tolist(), reverse=True)
        assert of_each == [min(max(count - 10 * i, 0), 10) for i in range(3)]
        assert all((np.diff(group) <= 0).all() for group in copies.reshape(3, 10))  # the first ones of the file


def test_what_is_held_back_is_held_back_whole(tmp_path, tokenizer):
    data = PretrainDataset(write(tmp_path / "a.jsonl", some_rows(100)), tokenizer)
    few, all_of_it = (split_source("a", data, Sampling(ratio, val_ratio=0.3), seed=42) for ratio in (0.1, 1.0))
    assert bag(few.held_back) == bag(all_of_it.held_back) and bag(few.train) < bag(all_of_it.train)


# --- the sampling file ------------------------------------------------------------------------------------------------


def test_a_sampling_file(tmp_path):
    path = tmp_path / "mix.json"
    entries = {"default": {"ratio": 0.5, "max_samples": 9}, "b.jsonl": {"val_split": 0.1, "max_samples": None}}
    path.write_text(json.dumps(entries | {"org/name": {"ratio": 2}}), encoding="utf-8")
    names = ["data/a.jsonl", "other/b.jsonl", "org/name", "b.jsonl"]
    b = Sampling(0.5 * 0.4, None, 0.1)
    expected = [Sampling(0.5 * 0.4, 9, 0.02), b, Sampling(2 * 0.4, 9, 0.02), b]
    assert read_sampling(path, names, Sampling(0.4, val_ratio=0.02)) == expected
    assert read_sampling(None, names, Sampling(0.4, val_ratio=0.02)) == [Sampling(0.4, val_ratio=0.02)] * 4


MISTAKES = {
    "no JSON": ("{", "mix.json is no JSON: .*repair"),
    "a list": ("[]", "not an object of objects: write it as"),
    "a number": ('{"a.jsonl": 0.5}', "not an object of objects: write it as"),
    "another name": ('{"a.jsonl": {}, "c.jsonl": {}}', "names c.jsonl, but the sources are a.jsonl, b.jsonl"),
    "another key": ('{"a.jsonl": {"ratoi": 1}}', "a.jsonl: unknown key ratoi; use ratio, max_samples, val_ratio"),
    "both names": ('{"default": {"val_split": 0, "val_ratio": 0}}', "default: val_split and val_ratio are the same"),
    "negative": ('{"a.jsonl": {"ratio": -1}}', "mix.json: a.jsonl: ratio is -1: give a number of at least 0"),
    "no number": ('{"a.jsonl": {"ratio": "1"}}', "a.jsonl: ratio is '1'"),
    "true": ('{"a.jsonl": {"ratio": true}}', "a.jsonl: ratio is True"),
    "not finite": ('{"a.jsonl": {"ratio": NaN}}', "a.jsonl: ratio is nan"),
    "half a row": ('{"a.jsonl": {"max_samples": 1.5}}', "a.jsonl: max_samples is 1.5: give a whole number"),
    "everything": ('{"a.jsonl": {"val_ratio": 1}}', "a.jsonl: val_ratio is 1: give a number from 0 up to 1"),
}


@pytest.mark.parametrize("text, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_a_sampling_file(tmp_path, text, message):
    path = tmp_path / "mix.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_sampling(path, ["x/a.jsonl", "x/b.jsonl"], Sampling())
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# --- several in one ---------------------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path, tokenizer):
    """Datasets of 30, 0 and 20 documents, and what they come from."""

    def make(kind, **options):
        rows = some_rows(50)
        files = {"a.jsonl": rows[:30], "b.jsonl": rows[:1], "c.jsonl": rows[30:]}
        paths = [write(tmp_path / name, part) for name, part in files.items()]
        parts = [kind(path, tokenizer, 40, **options) for path in paths]
        parts[1] = parts[1].choose(np.array([0]))
        return MixedRows(paths, parts), parts, rows

    return make


@pytest.mark.parametrize("kind", [PretrainDataset, SFTDataset])
def test_a_mix_is_the_joined_file(tmp_path, tokenizer, three, kind):
    mixed, parts, rows = three(kind)
    joined = kind(write(tmp_path / "joined.jsonl", rows), tokenizer, 40)
    assert np.array_equal(mixed.lengths, joined.lengths) and mixed.lengths.dtype == np.int64
    assert mixed.report == joined.report and mixed.summary() == "3 sources: " + joined.summary()
    assert (len(mixed), mixed.max_length, mixed.may_cut) == (len(joined), 40, joined.may_cut)
    rng = random.Random(0)
    orders = [[], [0], [len(parts[0])], range(len(joined)), rng.choices(range(len(joined)), k=200)]
    for order in orders:
        for ours, theirs in zip(mixed.take(order), joined.take(order), strict=True):
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    order = np.array(orders[-1])
    offsets = np.array([rng.randrange(n) for n in joined.lengths[order]])
    lengths = np.array([rng.randint(1, n) for n in joined.lengths[order] - offsets])
    for ours, theirs in zip(mixed.take(order, offsets, lengths), joined.take(order, offsets, lengths), strict=True):
        assert np.array_equal(ours, theirs)
    for index in (len(joined), -1):
        with pytest.raises(IndexError, match=f"rows 0 to {index}|rows -1 to 0"):
            mixed.take([0, index])
    packed, expected = Rows(mixed, seed=3), Rows(joined, seed=3)
    for rows in (packed, expected):
        rows.set_epoch(2)
    assert all(np.array_equal(a, b) for i in range(len(expected)) for a, b in zip(packed[i], expected[i], strict=True))


@pytest.mark.parametrize("kind", [PretrainDataset, SFTDataset])
def test_pickled_a_mix_is_small_and_the_same(tmp_path, three, kind):
    mixed, parts, _ = three(kind, cache_dir=tmp_path / "cache")
    half = MixedRows(mixed.names, [part.choose(part.hashes % 2) for part in parts])
    packed = pickle.dumps(half)
    assert len(packed) < 12_000
    again = pickle.loads(packed)
    assert bag(again) == bag(half) and again.report == half.report and 0 < len(again) < len(mixed)


def test_documents_of_a_row_are_named(three):
    mixed, parts, rows = three(PretrainDataset)
    packed = Rows(mixed, seed=3)
    assert packed.report["split"]
    starts, found = np.cumsum([0, *map(len, parts)]), Counter()
    for index in range(len(packed)):
        ids, _, lengths = packed[index]
        pieces = [piece.tolist() for piece in np.split(ids, np.cumsum(lengths)[:-1])]
        expected = {}
        for piece, row in zip(pieces, packed.parts(index).documents, strict=True):
            number = int(np.searchsorted(starts, row, side="right")) - 1
            (document,), (whole,) = parts[number].documents([row - starts[number]])
            # by the tokens: the part of the one document of the file that has them
            encoded = parts[number]._layout.encoded
            end = int(encoded.lengths[: document + 1].sum())
            assert str(piece)[1:-1] in str(encoded.ids[end - whole : end].tolist())
            expected.setdefault(number, set()).add((document + 1, len(piece) < whole))
        texts = []
        for number, documents in sorted(expected.items()):
            words = ", ".join(f"part of {n}" if cut else str(n) for n, cut in sorted(documents))
            words = " and ".join(words.rsplit(", ", 1))
            single = words.replace("part of ", "part of document ") if "part" in words else f"document {words}"
            texts.append(f"{mixed.names[number]} " + (f"documents {words}" if len(documents) > 1 else single))
        assert packed.where(index) == "; ".join(texts)
        found.update(text.split()[1] for text in texts)
    assert set(found) == {"documents", "document", "part"}
    with pytest.raises(IndexError):
        packed.where(len(packed))


def test_names_worked_by_hand(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": word} for word in ("a", "b", "c " * 40, "d")])
    other = write(tmp_path / "b.jsonl", [{"text": "e"}])
    mixed = MixedRows(["x/a.jsonl", "b"], [PretrainDataset(p, tokenizer, 20) for p in (path, other)])
    lengths = mixed.lengths
    rows = np.flatnonzero(lengths < 20)  # a, b, the end of the c, d, e

    def where(*indices):
        return mixed.where(np.array(indices), np.zeros(len(indices), int), lengths[list(indices)])

    assert where(1, 0, 3, 2) == "x/a.jsonl documents 1, 2 and part of 3"
    assert where(3) == "x/a.jsonl part of document 3" and where(rows[-2]) == "x/a.jsonl document 4"
    assert where(rows[-1], 1, 0) == "x/a.jsonl documents 1 and 2; b document 1"


# --- as a stage opens them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [0, 1])
@pytest.mark.parametrize("kind, recipe", KINDS.values(), ids=KINDS)
def test_one_file_with_default_flags_gives_the_rows_of_the_dataset(tmp_path, tokenizer, said, kind, recipe, packing):
    path = write(tmp_path / "a.jsonl", some_rows(40))
    rows, val, _ = open_rows(arguments(path, packing=packing, max_seq_len=40), tokenizer, kind)
    expected = Rows(kind(path, tokenizer, 40), bool(packing), 42)
    assert val is None and rows.report == expected.report and said == [f"data: {expected.summary()}"]
    for epoch in (0, 3):
        rows.set_epoch(epoch)
        expected.set_epoch(epoch)
        assert all(
            np.array_equal(a, b) for i in range(len(expected)) for a, b in zip(rows[i], expected[i], strict=True)
        )


def test_stats_worked_by_hand(tmp_path, tokenizer, said):
    """Conversations of which one is too long to have a reply, and one is bad; two files, one of them repeated."""
    rows = some_rows(40)
    rows[7]["conversations"][0]["content"] = "far too long " * 60
    a = write(tmp_path / "a.jsonl", [*rows, {"text": "no conversation"}])
    b = write(tmp_path / "b.jsonl", some_rows(10, seed=8))
    mix = tmp_path / "mix.json"
    mix.write_text('{"b.jsonl": {"ratio": 2.5, "val_ratio": 0}}', encoding="utf-8")
    args = arguments(a, b, val_ratio=0.2, sampling=str(mix), max_seq_len=150, on_bad_row="skip")
    train, val, _ = open_rows(args, tokenizer, SFTDataset)
    held = held_back(SFTDataset(a, tokenizer, 150, "skip").hashes, 0.2)
    stats = {entry["dataset"]: entry for entry in train.stats}
    first, second = train.stats
    assert list(stats) == ["a.jsonl", "b.jsonl"] and first["path"] == a
    assert first["digest"] == token_cache._digest(tmp_path / "a.jsonl") != second["digest"]
    assert first["original_samples"] == first["sampled_samples"] == 40 and first["val_samples"] == held.sum() > 2
    assert not held[7] and first["train_samples"] == first["rows"] == 39 - held.sum() and first["dropped"] == 1
    assert (first["bad_rows"], first["repeated"], second["bad_rows"], second["dropped"]) == (1, 0, 0, 0)
    assert first["sampling_config"] == {"ratio": 1.0, "max_samples": None, "val_ratio": 0.2}
    assert (second["original_samples"], second["sampled_samples"], second["train_samples"]) == (10, 25, 25)
    assert (second["val_samples"], second["repeated"]) == (0, 15)
    for name in ("tokens", "trained_tokens", "cut", "replies_cut", "replies_lost", "dropped", "bad_rows"):
        assert train.report[name] == first[name] + second[name], name
    assert train.report["rows"] == len(train) == 39 - held.sum() + 25 and len(val) == held.sum()
    ids, trained, _ = train.dataset.take(range(len(train)))
    assert (len(ids), trained.sum()) == (train.report["tokens"], train.report["trained_tokens"])
    json.dumps(train.stats)
    assert (
        f"data: {a}: {train.dataset.parts[0].summary()}" in said and said[-1] == f"held back: {val.dataset.summary()}"
    )
    assert [line.count("1 bad rows skipped") for line in said] == [1, 0, 1, 0]


def test_both_kinds_of_held_back_rows_are_validated_on_and_leaks_are_told(tmp_path, tokenizer, said):
    rows = some_rows(60)
    a, val_path = write(tmp_path / "a.jsonl", rows), write(tmp_path / "val.jsonl", [*rows[:12], *some_rows(8, seed=3)])
    args = arguments(a, val_ratio=0.25, val_path=[val_path])
    train, val, _ = open_rows(args, tokenizer, PretrainDataset)
    held = held_back(PretrainDataset(a, tokenizer).hashes, 0.25)
    assert len(val) == 20 + held.sum() and len(train) == 60 - held.sum() and 0 < held[:12].sum() < 12
    both = 12 - held[:12].sum()  # held back of the one file, and trained on from the other
    expected = f"warning: {both} of {len(val)} held-back documents are also trained on: their loss is too low"
    assert warnings_of(said) == [expected]
    said.clear()
    open_rows(arguments(a, val_ratio=0.25), tokenizer, PretrainDataset)
    assert warnings_of(said) == []
    # two shares of what is held back: a document of both files can be on both sides
    mix = tmp_path / "mix.json"
    mix.write_text('{"a.jsonl": {"val_ratio": 0.25}, "copy.jsonl": {"val_ratio": 0.01}}', encoding="utf-8")
    copied = write(tmp_path / "copy.jsonl", rows)
    open_rows(arguments(a, copied, sampling=str(mix)), tokenizer, PretrainDataset)
    assert len(warnings_of(said)) == 1 and "held-back documents are also trained on" in said[-1]


def test_sources_without_rows_are_told_and_are_an_error_if_all_are(tmp_path, tokenizer, said):
    paths = [write(tmp_path / f"{name}.jsonl", some_rows(5, seed)) for seed, name in enumerate("abc")]
    paths += [write(tmp_path / "long.jsonl", [{"input": "far too long " * 190, "output": "x"}])]
    mix = tmp_path / "mix.json"
    mix.write_text('{"b.jsonl": {"ratio": 0, "val_ratio": 0.5}, "c.jsonl": {"ratio": 0.1}}', encoding="utf-8")
    args = arguments(*paths, sampling=str(mix), max_seq_len=200)
    train, val, _ = open_rows(args, tokenizer, SFTDataset)
    assert len(train) == 5 and val is None
    assert warnings_of(said) == [
        f"warning: no row is trained on of {paths[1]}: its ratio or max_samples is 0",
        f"warning: no row is trained on of {paths[2]}: of its 5 documents 0 are held back, and a ratio of 0.1 keeps "
        "none of the others: raise the ratio, or lower the val_ratio",
        f"warning: no row is trained on of {paths[3]}: none of 1 rows has a reply within 200 tokens: raise "
        "--max_seq_len, or shorten the prompts",
    ]
    assert [entry["train_samples"] for entry in train.stats] == [5, 0, 0, 0]
    assert [entry["original_samples"] for entry in train.stats] == [5, None, 5, 1]
    assert [entry["sampled_samples"] for entry in train.stats] == [5, 0, 0, 1]
    args.data_path = paths[1:]
    with pytest.raises(ValueError, match="b.jsonl: its ratio .*; .*c.jsonl: of its 5 .*; .*long.jsonl: none of 1 rows"):
        open_rows(args, tokenizer, SFTDataset)
    with pytest.raises(ValueError, match="^[^;]*long.jsonl: none of 1 rows has a reply within 200 tokens"):
        open_rows(arguments(paths[3], max_seq_len=200), tokenizer, SFTDataset)
    with pytest.raises(ValueError, match="long.jsonl: none of 1 rows has a reply"):
        open_rows(arguments(paths[0], val_path=[paths[3]], max_seq_len=200), tokenizer, SFTDataset)
    said.clear()
    args = arguments(paths[0], val_path=[paths[3], paths[2]], max_seq_len=200)
    _, val, _ = open_rows(args, tokenizer, SFTDataset)
    assert len(val) == 5 and len(warnings_of(said)) == 1 and "no row is validated on of" in warnings_of(said)[0]


def test_a_file_given_twice_counts_twice_and_is_read_once(tmp_path, tokenizer, said, monkeypatch):
    a, b = write(tmp_path / "a.jsonl", some_rows(6)), write(tmp_path / "b.jsonl", some_rows(3, seed=2))
    read = []
    monkeypatch.setattr("dataset.lm_dataset.tokenise", lambda path, *rest: read.append(path) or tokenise(path, *rest))
    train, _, _ = open_rows(arguments(a, b, a), tokenizer, PretrainDataset)
    once, other = (bag(PretrainDataset(path, tokenizer)) for path in (a, b))
    assert bag(train.dataset) == once + once + other and read[:2] == [a, b] and read.count(a) == 2
    assert warnings_of(said) == [f"note: {a} is given 2 times: its rows are trained on as often in each epoch"]
    assert [entry["train_samples"] for entry in train.stats] == [6, 3, 6]


def test_sample_ratio_is_for_all_and_is_checked(tmp_path, tokenizer, said):
    a, b = write(tmp_path / "a.jsonl", some_rows(40)), write(tmp_path / "b.jsonl", some_rows(20, seed=2))
    train, _, _ = open_rows(arguments(a, b, sample_ratio=0.25), tokenizer, PretrainDataset)
    assert [entry["train_samples"] for entry in train.stats] == [10, 5]
    with pytest.raises(ValueError, match="--sample_ratio or --val_ratio: ratio is -1.0: give a number of at least 0"):
        open_rows(arguments(a, sample_ratio=-1.0), tokenizer, PretrainDataset)


def test_the_digest_changes_with_whatever_changes_the_rows(tmp_path, tokenizer, said):
    a, b = write(tmp_path / "a.jsonl", some_rows(12)), write(tmp_path / "b.jsonl", some_rows(6, seed=2))

    def digest(*paths, kind=SFTDataset, train_on="all", **changed):
        options = {"train_on": train_on} if kind is SFTDataset else {}
        rows, _, _ = open_rows(arguments(*(paths or (a, b)), **changed), tokenizer, kind, **options)
        assert len(rows.digest) == 64
        return rows.digest

    moved = write(tmp_path / "moved.jsonl", some_rows(12))
    same = [digest(), digest(cache_dir=tmp_path / "cache"), digest(cache_dir=tmp_path / "cache"), digest(moved, b)]
    others = [digest(b, a), digest(a), digest(a, b, b), digest(kind=PretrainDataset), digest(train_on="last")]
    others += [digest(seed=1), digest(max_seq_len=200), digest(packing=1), digest(val_ratio=0.3)]
    others += [digest(sample_ratio=0.5)]
    write(tmp_path / "a.jsonl", some_rows(12, seed=7))
    others += [digest()]
    assert len(set(same)) == 1 and len({*same, *others}) == 1 + len(others)


def test_rows_of_the_hub_are_mixed_too_and_known_by_their_content(tokenizer, said, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: some_rows(20))
    train, val, _ = open_rows(arguments("org/name:train", val_ratio=0.3), tokenizer, PretrainDataset)
    assert len(train) + len(val) == 20 and train.stats[0]["digest"] is None
    assert train.where(0).startswith("org/name:train document ")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: some_rows(20, seed=1))
    other, _, _ = open_rows(arguments("org/name:train", val_ratio=0.3), tokenizer, PretrainDataset)
    assert other.digest != train.digest


def test_streams_say_what_they_cannot_do_and_have_a_digest(tmp_path, tokenizer, said):
    a, b = write(tmp_path / "a.jsonl", some_rows(12)), write(tmp_path / "b.jsonl", some_rows(6, seed=2))

    def stream(*paths, **changed):
        return open_rows(arguments(*paths, streaming=1, **{"max_steps": 3} | changed), tokenizer, PretrainDataset)

    with pytest.raises(ValueError, match="--streaming 1 takes one --data_path, and 2 were given: join the files"):
        stream(a, b)
    for changed in ({"val_ratio": 0.1}, {"sample_ratio": 0.5}, {"sampling": a}):
        with pytest.raises(ValueError, match="leave out --sampling, --sample_ratio and --val_ratio .*--val_path"):
            stream(a, **changed)
    rows, val, _ = stream(a, val_path=[b])
    assert len(rows) == 6 and len(val) == 6 and rows.where(16) == "row 17 of the stream"
    assert [entry["dataset"] for entry in rows.stats] == ["a.jsonl"]
    assert stream(a)[0].digest == rows.digest == stream(a, max_steps=9)[0].digest
    assert (
        len({rows.digest, *(stream(a, **c)[0].digest for c in ({"seed": 1}, {"packing": 1}))} | {stream(b)[0].digest})
        == 4
    )
