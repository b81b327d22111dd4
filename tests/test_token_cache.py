"""The token cache: it gives what tokenising gives, is built once, and is never taken for whole or current if it is not.

python -m pytest tests/test_token_cache.py
"""

import errno
import gzip
import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest
import torch

from conftest import ROOT
from dataset import encode, jsonl, token_cache
from dataset.encode import Encoded, FrozenTokenizer, PretrainRecipe, SFTRecipe, cut_rows, runs_of, split_rows
from dataset.jsonl import BadRow, read_rows
from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.parallel import map_in_processes
from dataset.token_cache import encoded_batches, tokenise
from model.chat import encode_text, render

POSIX = pytest.mark.skipif(os.name == "nt", reason="signals as on Unix")
WORDS = ["你好", "the quick fox", "四 五", "1234", "a\nb", "🙂", "猫 "]
KINDS = {"pretrain": (PretrainDataset, PretrainRecipe()), "sft": (SFTDataset, SFTRecipe())}


def a_row(rng):
    def text():
        return "".join(rng.choices(WORDS, k=rng.randint(1, 30))) + "x"

    turns = [{"role": role, "content": text()} for _ in range(rng.randint(1, 3)) for role in ("user", "assistant")]
    system = [{"role": "system", "content": text()}] if rng.random() < 0.3 else []
    return {"text": text() * rng.randint(1, 4), "conversations": system + turns}


def write(path, rows):
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def source(tmp_path):
    rng = random.Random(1)
    return write(tmp_path / "some.rows.jsonl", [a_row(rng) for _ in range(80)])


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "made" / "cache"


@pytest.fixture
def in_parallel(monkeypatch):
    """Two processes for every file, and some twenty batches in the smallest."""
    monkeypatch.setattr(token_cache, "worker_count", lambda path, ranks=1: 2)
    monkeypatch.setattr(token_cache, "BATCH_BYTES", 4096)


def names(cache, suffix=""):
    """Files of a cache folder, but for locks: a build gives its data files new names."""
    return sorted(p.name for p in cache.iterdir() if p.name.endswith(suffix) and p.suffix != ".lock")


def record_of(cache):
    (path,) = cache.glob("*.json")
    return path, json.loads(path.read_text(encoding="utf-8"))


def equal(first, second):
    """Two datasets are the same to the last bit."""
    assert first.report == second.report and first.summary() == second.summary()
    assert first.lengths.dtype == np.int64 and np.array_equal(first.lengths, second.lengths)
    for ours, theirs in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return True


def same_arrays(first, second):
    assert first.rows == second.rows and first.empty == second.empty
    for name in token_cache.COLUMNS:
        a, b = getattr(first, name), getattr(second, name)
        assert (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b)), name
    return True


# --- what the rows are ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, recipe", KINDS.values(), ids=KINDS)
def test_a_cache_built_once_gives_what_memory_gives_at_every_length(source, cache, tokenizer, kind, recipe):
    built = None
    for max_length in (16, 2, 60, 512) if kind is PretrainDataset else (16, 30, 60, 512):
        assert equal(kind(source, tokenizer, max_length, cache_dir=cache), kind(source, tokenizer, max_length))
        built = built or names(cache)
        assert names(cache) == built
    assert len(built) == len([n for n in built if n.startswith("some-")]) == (4 if kind is PretrainDataset else 6)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json"])
def test_other_files_are_cached_too(tmp_path, source, cache, tokenizer, name):
    rows = [row for _, row in read_rows(source)]
    path = write(tmp_path / name, rows)
    if name == "a.json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    for _ in range(2):
        assert equal(SFTDataset(path, tokenizer, 60, cache_dir=cache), SFTDataset(source, tokenizer, 60))
    assert len(names(cache)) == 6


@pytest.mark.parametrize("max_length", [24, 60, 512])
def test_take_gives_rows_end_to_end(source, cache, tokenizer, max_length):
    """Against rows rendered one by one."""
    expected = []
    for _, row in read_rows(source):
        ids, mask = render(tokenizer, row["conversations"])
        ids, mask = ids[:max_length], [False, *map(bool, mask[1:max_length])]
        expected += [(ids, mask)] if any(mask) else []
    dataset = SFTDataset(source, tokenizer, max_length, cache_dir=cache)
    assert len(dataset) == len(expected)
    rng = random.Random(0)
    for order in ([0], [3, 1, 1, -1], rng.choices(range(len(expected)), k=50), [], range(len(expected))):
        ids, trained, lengths = dataset.take(np.array(order, dtype=np.int64))
        assert (ids.dtype, trained.dtype, lengths.dtype) == (np.int64, np.bool_, np.int64)
        assert ids.tolist() == [i for row in order for i in expected[row][0]]
        assert trained.tolist() == [i for row in order for i in expected[row][1]]
        assert lengths.tolist() == [len(expected[row][0]) for row in order]
    with pytest.raises(IndexError):
        dataset.take([len(expected)])


@pytest.mark.parametrize("chunk", [7, 1 << 16])
def test_take_of_documents(source, tokenizer, chunk, monkeypatch):
    monkeypatch.setattr(encode, "DOCUMENTS_PER_CHUNK", chunk)
    dataset = PretrainDataset(source, tokenizer, 20)
    texts = [row["text"] for _, row in read_rows(source)]
    documents = [[tokenizer.bos_token_id, *encode_text(tokenizer, t), tokenizer.eos_token_id] for t in texts]
    rows = [document[i : i + 20] for document in documents for i in range(0, len(document) - 1, 19)]
    ids, trained, lengths = dataset.take(range(len(rows)))
    assert lengths.tolist() == list(map(len, rows)) and ids.tolist() == list(itertools.chain(*rows))
    assert trained.tolist() == [i > 0 for row in rows for i in range(len(row))]


@pytest.mark.parametrize("chunk", [7, 1 << 16])
def test_cutting_whole_arrays_counts_like_cutting_row_by_row(chunk, monkeypatch):
    monkeypatch.setattr(encode, "DOCUMENTS_PER_CHUNK", chunk)
    rng = random.Random(2)
    masks = [[rng.choice([0, 0, 0, 1, 1]) for _ in range(rng.randint(1, 12))] for _ in range(300)]
    spans = [runs_of(mask) for mask in masks]
    for mask, runs in zip(masks, spans, strict=True):
        assert mask == [int(any(s <= i < e for s, e in runs)) for i in range(len(mask))]
        assert all(s < e and (e == len(mask) or not mask[e]) for s, e in runs)
    lengths = np.array([len(mask) for mask in masks], np.int32)
    flat = np.array(list(itertools.chain(*spans)), np.int32).reshape(-1, 2)
    counts = np.array([len(runs) for runs in spans], np.int32)
    encoded = Encoded(np.arange(lengths.sum(), dtype=np.uint16), lengths, flat, counts)
    for limit in (2, 3, 5, 8, 12):
        rows = cut_rows(encoded, limit)
        kept = [mask[:limit] for mask in masks if any(mask[1:limit])]
        runs = list(itertools.chain(*spans))
        assert rows.report == {
            "rows": len(kept),
            "tokens": sum(map(len, kept)),
            "trained_tokens": sum(sum(mask[1:]) for mask in kept),
            "cut": sum(len(mask) > limit for mask in masks),
            "replies_cut": sum(start < limit < end for start, end in runs),
            "replies_lost": sum(start >= limit for start, _ in runs),
            "dropped": len(masks) - len(kept),
        }
        _, trained, _ = rows.take(range(len(rows)))
        assert trained.tolist() == [bool(m) and i > 0 for mask in kept for i, m in enumerate(mask)]


@pytest.mark.parametrize("kind, recipe", KINDS.values(), ids=KINDS)
def test_a_stream_of_batches_gives_the_rows_of_the_whole(source, tokenizer, kind, recipe, monkeypatch):
    monkeypatch.setattr(token_cache, "BATCH_BYTES", 4096)
    whole, lay_out = kind(source, tokenizer, 60), split_rows if kind is PretrainDataset else cut_rows
    parts = [lay_out(batch, 60) for batch in encoded_batches(read_rows(source), tokenizer, recipe, workers=0)]
    assert len(parts) > 5
    taken = [rows.take(range(len(rows))) for rows in parts]
    for ours, theirs in zip(zip(*taken, strict=True), whole.take(range(len(whole))), strict=True):
        assert np.array_equal(np.concatenate(ours), theirs)
    for name in whole._layout.report:
        assert sum(rows.report[name] for rows in parts) == whole.report[name], name


@pytest.mark.parametrize("kind, recipe", KINDS.values(), ids=KINDS)
def test_pickled_a_cached_dataset_is_small_and_the_same(source, cache, tokenizer, kind, recipe):
    cached, in_memory = kind(source, tokenizer, 60, cache_dir=cache), kind(source, tokenizer, 60)
    packed = pickle.dumps(cached)
    assert len(packed) < 4000 < len(pickle.dumps(in_memory))
    assert equal(pickle.loads(packed), in_memory) and equal(pickle.loads(pickle.dumps(in_memory)), in_memory)
    for path in cache.glob("*.ids"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"\.ids of the token cache is missing: start again"):
        pickle.loads(packed)


# --- in processes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [PretrainRecipe(), *map(SFTRecipe, ("all", "last", "system"))], ids=str)
def test_parallel_equals_serial_bit_for_bit(source, tokenizer, recipe, in_parallel, monkeypatch):
    parallel, _ = tokenise(source, tokenizer, recipe)
    monkeypatch.undo()
    serial, _ = tokenise(source, tokenizer, recipe)
    assert same_arrays(parallel, serial) and len(serial.ids) > 5000


def test_the_right_number_of_processes(source, monkeypatch):
    monkeypatch.setattr(token_cache.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(token_cache.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert token_cache.worker_count(source) == token_cache.worker_count("org/name") == 0
    monkeypatch.setattr(token_cache, "PARALLEL_BYTES", source.stat().st_size)
    assert [token_cache.worker_count(source, ranks) for ranks in (1, 2, 4, 5, 8, 9)] == [8, 4, 2, 0, 0, 0]


def test_results_come_in_order_and_few_are_on_the_way():
    taken = []

    def numbers():
        for i in range(40):
            taken.append(i)
            yield str(i)

    with closing(map_in_processes(int, numbers(), 2)) as results:
        for i, result in enumerate(results):
            assert result == i and len(taken) <= i + 1 + 4
    assert i == 39


def test_an_error_of_a_process_is_raised_as_itself_in_its_place():
    def batches():
        yield from ["1", "2", "x", "4"]

    with closing(map_in_processes(int, batches(), 2)) as results:
        assert [next(results), next(results)] == [1, 2]
        with pytest.raises(ValueError, match="invalid literal for int.*'x'") as caught:
            next(results)
    assert "Traceback" in str(caught.value.__cause__)


def test_an_error_of_the_source_comes_after_what_was_read_before_it():
    def batches():
        yield from ["1", "2", "3"]
        raise OSError("the disk is gone")

    results, seen = map_in_processes(int, batches(), 2), []
    with pytest.raises(OSError, match="the disk is gone"):
        seen.extend(results)
    assert seen == [1, 2, 3]


def test_a_process_that_dies_is_an_error():
    with pytest.raises(ChildProcessError, match="ended without a result.*memory"):
        list(map_in_processes(os._exit, iter([3]), 2))


def test_processes_end_when_the_results_are_not_wanted_any_more():
    results = map_in_processes(int, iter("12345678"), 2)
    assert next(results) == 1
    import multiprocessing

    running = multiprocessing.active_children()
    assert len(running) == 2
    results.close()
    assert not any(process.is_alive() for process in running)


def test_a_script_without_a_guard_is_not_run_again_and_a_process_is_light(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nprint('once')\n"
        "from dataset import token_cache\nfrom dataset.parallel import map_in_processes\n"
        "assert not {'torch', 'transformers', 'filelock', 'tqdm'} & set(sys.modules), 'too heavy'\n"
        "print(list(map_in_processes(int, iter('12'), 2)))\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("once\n[1, 2]\n", "")


BAD = [{"text": None, "conversations": []}, {"txt": "x"}]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind, recipe", KINDS.values(), ids=KINDS)
def test_bad_rows_are_reported_as_when_reading_row_by_row(
    tmp_path, source, tokenizer, kind, recipe, workers, monkeypatch, capsys
):
    monkeypatch.setattr(token_cache, "BATCH_BYTES", 4096)
    lines = source.read_bytes().splitlines(keepends=True)
    for place in (70, 40, 13):
        lines[place:place] = [json.dumps(row).encode() + b"\n" for row in BAD] + [b"{\n"]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"".join(lines))
    with pytest.raises(BadRow) as expected:
        list(read_rows(path, validate=recipe.read))
    with pytest.raises(BadRow) as caught:
        list(encoded_batches(read_rows(path), tokenizer, recipe, workers))
    assert str(caught.value) == str(expected.value) and caught.value.line == 14

    by_row = read_rows(path, "skip", recipe.read)
    assert len(list(by_row)) == 80
    reader = read_rows(path, "skip")
    assert sum(batch.rows for batch in encoded_batches(reader, tokenizer, recipe, workers)) == reader.rows == 80
    assert (reader.skipped, reader.skipped_lines) == (by_row.skipped, by_row.skipped_lines)
    first, second = capsys.readouterr().err.splitlines()
    assert first == second and "9 of 89 rows skipped" in first


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_error_of_the_file_wins(tmp_path, source, tokenizer, workers, monkeypatch):
    """A bad row before a conversation that the template refuses, one behind it, and a list that breaks off."""
    monkeypatch.setattr(token_cache, "BATCH_BYTES", 4096)
    monkeypatch.setattr(token_cache, "DECODED_BYTES", 300)  # several rows of a list to a batch
    refused = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('never') }}{% endif %}{% endfor %}"
    good = [row for _, row in read_rows(source)]
    no = {"conversations": [{"role": "user", "content": "no"}, {"role": "assistant", "content": "no"}]}
    monkeypatch.setattr(tokenizer, "chat_template", refused + tokenizer.chat_template)

    def error_of(rows, on_bad_row="raise", name="a.jsonl", end=""):
        path = write(tmp_path / name, rows)
        if end:
            path.write_text(json.dumps(rows)[:-1] + end, encoding="utf-8")
        with pytest.raises(ValueError) as caught:
            list(encoded_batches(read_rows(path, on_bad_row), tokenizer, SFTRecipe(), workers))
        return str(caught.value).removeprefix(f"{path}:")

    assert error_of([*good, BAD[1], no]).startswith("81: missing key")
    assert error_of([*good, BAD[1], no], "skip") == "82: the chat template refuses this conversation: never"
    assert error_of([*good, no, BAD[1]]) == "81: the chat template refuses this conversation: never"
    assert error_of([*good, BAD[1]], name="a.json", end=",\n{") == "1: " + error_of([BAD[1]])[3:]
    assert error_of([*good], name="a.json", end=",\n{").startswith("2: broken JSON")


def test_bad_rows_of_a_cache(tmp_path, source, cache, tokenizer, in_parallel, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(source.read_bytes() + json.dumps(BAD[1]).encode() + b"\n[]\n")
    with pytest.raises(BadRow, match="bad.jsonl:81: missing key") as first:
        SFTDataset(path, tokenizer, 60, cache_dir=cache)
    assert names(cache) == []  # nothing is kept of it
    in_memory = SFTDataset(path, tokenizer, 60, on_bad_row="skip")
    for _ in range(2):  # built, and opened
        assert equal(SFTDataset(path, tokenizer, 60, on_bad_row="skip", cache_dir=cache), in_memory)
    with pytest.raises(BadRow) as opened:
        SFTDataset(path, tokenizer, 60, cache_dir=cache)
    assert str(opened.value) == str(first.value) and (opened.value.path, opened.value.line) == (str(path), 81)
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == [f"{path}: 2 of 82 rows skipped (1 missing key, 1 not an object), at line 81, 82"] * 3
    assert len(names(cache)) == 6


def test_other_ranks_are_quiet(tmp_path, cache, tokenizer, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    path = write(tmp_path / "a.jsonl", [{"text": "x"}, {}])
    for _ in range(2):
        PretrainDataset(path, tokenizer, 60, on_bad_row="skip", cache_dir=cache)
    assert capsys.readouterr().err == ""


def test_no_row_at_all(tmp_path, cache, tokenizer):
    for data, message in ((b"\n \n", "holds no rows"), (b"{}\n[]\n", "none of 1 rows is usable"), (b"", "is empty")):
        (tmp_path / "a.jsonl").write_bytes(data)
        on_bad_row = "skip" if b"{" in data else "raise"
        message = message.replace("1", "2")
        with pytest.raises(ValueError, match=message):
            PretrainDataset(tmp_path / "a.jsonl", tokenizer, cache_dir=cache, on_bad_row=on_bad_row)
    assert names(cache) == []
    write(tmp_path / "a.jsonl", [{"text": "<|im_start|><|im_end|>"}])
    for _ in range(2):
        with pytest.raises(ValueError, match="all 1 texts are empty but for BOS and EOS"):
            PretrainDataset(tmp_path / "a.jsonl", tokenizer, cache_dir=cache)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_encoding_starts_no_threads():
    """The tokenizers library warns about a fork (of a DataLoader, say) in a process where it has started some."""
    code = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from transformers import AutoTokenizer\n"
        "from dataset.encode import FrozenTokenizer, PretrainRecipe\n"
        f"tokenizer = FrozenTokenizer(AutoTokenizer.from_pretrained({str(ROOT / 'model')!r}))\n"
        "threads = os.listdir('/proc/self/task')\n"
        "assert PretrainRecipe().encode(tokenizer, [(1, 'a b c')] * 200, '').rows == 200\n"
        "print(threads == os.listdir('/proc/self/task'), os.environ.get('TOKENIZERS_PARALLELISM'))"
    )
    env = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert (done.stdout, done.stderr) == ("True None\n", "")


# --- what a cache belongs to ------------------------------------------------------------------------------------------


def key(source, tokenizer, recipe):
    frozen = FrozenTokenizer(tokenizer, recipe.templated)
    return token_cache._Cache(source, frozen, recipe, ROOT).name


def test_the_key(tmp_path, source, tokenizer, monkeypatch):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(ROOT / "model")
    first, pretrain = key(source, tokenizer, SFTRecipe()), key(source, tokenizer, PretrainRecipe())
    assert key(source, other, SFTRecipe()) == first != pretrain
    other(["a", "b b"], padding=True, truncation=True, max_length=2)  # leaves its settings in the tokenizer
    assert key(source, other, SFTRecipe()) == first
    assert key(os.path.relpath(source), other, SFTRecipe()) == first
    assert len({key(source, other, SFTRecipe(t)) for t in ("all", "last", "system")}) == 3
    assert key(write(tmp_path / "some.jsonl", []), other, SFTRecipe()) != first  # another file of the same stem
    monkeypatch.setattr(token_cache, "_code_digest", lambda: "rewritten")
    assert key(source, other, SFTRecipe()) != first
    monkeypatch.undo()
    other.chat_template += " "
    assert key(source, other, SFTRecipe()) != first and key(source, other, PretrainRecipe()) == pretrain
    other.add_tokens(["<new>"])
    assert key(source, other, PretrainRecipe()) != pretrain


def test_another_template_is_another_cache(source, cache, tokenizer, monkeypatch):
    first = SFTDataset(source, tokenizer, 512, cache_dir=cache)
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + "{{ 'bye' }}")
    changed = SFTDataset(source, tokenizer, 512, cache_dir=cache)
    assert equal(changed, SFTDataset(source, tokenizer, 512)) and changed.report["tokens"] > first.report["tokens"]
    monkeypatch.undo()
    built = names(cache)
    assert equal(SFTDataset(source, tokenizer, 512, cache_dir=cache), first) and names(cache) == built
    assert len(names(cache, ".json")) == 2


def test_names_on_the_hub_are_not_cached(cache, tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [{"text": "x"}] * 3)
    assert len(PretrainDataset("org/name", tokenizer, cache_dir=cache)) == 3 and not cache.exists()


# --- whether it is current --------------------------------------------------------------------------------------------


def change(path, at, keep_time):
    """Another letter at a place of the file, which was an x."""
    status, data = path.stat(), bytearray(path.read_bytes())
    assert data[at : at + 1] == b"x"
    data[at : at + 1] = b"y"
    path.write_bytes(data)
    times = status.st_mtime_ns if keep_time else status.st_mtime_ns + 10**9
    os.utime(path, ns=(times, times))


def opened(source, cache, tokenizer):
    """Open the cache; whether it was built for that, which only gives right rows."""
    before = names(cache)
    assert equal(PretrainDataset(source, tokenizer, 60, cache_dir=cache), PretrainDataset(source, tokenizer, 60))
    assert len(names(cache)) == 4, "what is old is removed"
    return names(cache) != before


def test_a_changed_row_is_seen(source, cache, tokenizer, capsys):
    PretrainDataset(source, tokenizer, 60, cache_dir=cache)
    assert not opened(source, cache, tokenizer)
    change(source, source.read_bytes().rindex(b'x"'), keep_time=True)
    assert opened(source, cache, tokenizer) and not opened(source, cache, tokenizer)
    source.write_bytes(source.read_bytes() + b'{"text": "one more"}\n')
    assert opened(source, cache, tokenizer) and not opened(source, cache, tokenizer)
    reason = f"{source}: tokenised again, because the file changed since it was tokenised\n"
    assert capsys.readouterr().err == reason * 2


def test_only_another_time_is_no_change_and_is_noted(source, cache, tokenizer, monkeypatch, capsys):
    PretrainDataset(source, tokenizer, 60, cache_dir=cache)
    os.utime(source, ns=(1, 10**18))
    assert not opened(source, cache, tokenizer)
    assert record_of(cache)[1]["source"]["mtime_ns"] == 10**18

    def never(path):
        raise AssertionError("the whole file is read once, not at every start")

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "_digest", never)
        assert not opened(source, cache, tokenizer)
    os.utime(source, ns=(1, 10**17))
    monkeypatch.setattr(token_cache.os, "replace", fail)  # on a full disk it is only read again the next time
    PretrainDataset(source, tokenizer, 60, cache_dir=cache)
    assert capsys.readouterr().err == ""


def test_what_sampled_blocks_see_and_what_they_miss(source, cache, tokenizer, monkeypatch):
    monkeypatch.setattr(token_cache, "BLOCK", 8)
    data = source.read_bytes()
    sampled = {at + i for b in range(32) for at in [(len(data) - 8) * b // 31] for i in range(8)}
    assert {0, len(data) - 1} < sampled
    places = [i for i in range(len(data)) if data[i : i + 2] == b'x"']  # where a text ends
    inside, outside = (next(i for i in places if (i in sampled) == wanted) for wanted in (True, False))
    PretrainDataset(source, tokenizer, 60, cache_dir=cache)
    change(source, inside, keep_time=True)
    assert opened(source, cache, tokenizer)
    change(source, outside, keep_time=False)  # the time is another: the whole file decides
    assert opened(source, cache, tokenizer)
    outside = next(i for i in places if i not in sampled and i != outside)
    built = names(cache)
    change(source, outside, keep_time=True)  # the documented gap
    PretrainDataset(source, tokenizer, 60, cache_dir=cache)
    assert names(cache) == built


def test_a_source_that_changes_meanwhile_is_an_error(source, cache, tokenizer, monkeypatch):
    def while_somebody_writes(*args):
        yield from encoded_batches(*args)
        with source.open("ab") as file:
            file.write(b'{"text": "late"}\n')

    monkeypatch.setattr(token_cache, "encoded_batches", while_somebody_writes)
    with pytest.raises(ValueError, match="changed while it was being tokenised: start again"):
        PretrainDataset(source, tokenizer, 60, cache_dir=cache)
    assert names(cache) == []


# --- whether it is whole ----------------------------------------------------------------------------------------------


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fill_with_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


DAMAGE = {
    **{f"{name} cut": (name, cut_in_half) for name in token_cache.COLUMNS},
    **{f"{name} missing": (name, os.remove) for name in token_cache.COLUMNS},
    "lengths lost": ("lengths", fill_with_zeros),
    "counts lost": ("span_counts", fill_with_zeros),
    "record cut": ("json", cut_in_half),
    "record empty": ("json", lambda path: path.write_bytes(b"")),
    "record zeros": ("json", fill_with_zeros),
    "record of something else": ("json", lambda path: path.write_text('["a"]')),
    "record without files": ("json", lambda path: path.write_text("{}")),
    "record of another cache": (
        "json",
        lambda path: path.write_text(path.read_text(encoding="utf-8").replace('"name": "some-', '"name": "other-')),
    ),
}


@pytest.mark.parametrize("suffix, damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_built_again(source, cache, tokenizer, suffix, damage, capsys):
    expected = SFTDataset(source, tokenizer, 60)
    SFTDataset(source, tokenizer, 60, cache_dir=cache)
    built = names(cache)
    (path,) = cache.glob(f"*.{suffix}")
    damage(path)
    assert equal(SFTDataset(source, tokenizer, 60, cache_dir=cache), expected)
    assert len(names(cache)) == 6 and len(set(names(cache)) - set(built)) == 5
    message = capsys.readouterr().err
    assert message.startswith(f"{source}: tokenised again, because ") and message.count("\n") == 1
    assert (" bytes, not " in message) == (damage is cut_in_half and suffix != "json")


def test_without_a_record_it_is_none_and_leftovers_go_first(source, cache, tokenizer, monkeypatch):
    SFTDataset(source, tokenizer, 60, cache_dir=cache)
    path, record = record_of(cache)
    path.unlink()
    (cache / f"{record['name']}-0123abcd.record").write_text("{")
    (cache / "somebody's.txt").write_text("stays")
    build, seen = token_cache._encode_into, []
    monkeypatch.setattr(token_cache, "_encode_into", lambda *a: seen.extend(names(cache)) or build(*a))
    SFTDataset(source, tokenizer, 60, cache_dir=cache)
    assert len(seen) == 6 and "somebody's.txt" in seen  # the new files, which are still empty
    assert len(names(cache)) == 7 and "somebody's.txt" in names(cache)
    assert not set(names(cache)) & {file["name"] for file in record["files"].values()}


BUILD = """
import sys
sys.path.insert(0, sys.argv[1])
from transformers import AutoTokenizer
from dataset import token_cache
from dataset.encode import SFTRecipe

token_cache.worker_count = lambda path, ranks=1: 2
token_cache.BATCH_BYTES, token_cache.PATIENCE = 1 << 14, 0.05
build, built = token_cache._encode_into, []
token_cache._encode_into = lambda *args: built.append(1) or build(*args)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1] + "/model")
print("ready", flush=True)
sys.stdin.readline()
try:
    encoded, _ = token_cache.tokenise(sys.argv[2], tokenizer, SFTRecipe(), cache_dir=sys.argv[3])
except KeyboardInterrupt:
    sys.exit(130)
print(len(built), encoded.ids.sum(), encoded.where[1]["files"]["ids"]["name"])
"""


def start_build(source, cache):
    """A process that begins to build when it gets a line."""
    command = [sys.executable, "-c", BUILD, str(ROOT), str(source), str(cache)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, **pipes, text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    return process


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def is_gone(group):
    """No process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture
def large(tmp_path):
    rng = random.Random(3)
    return write(tmp_path / "large.jsonl", [a_row(rng) for _ in range(4000)])


@POSIX
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_a_build_that_is_killed_leaves_no_cache_and_no_process(large, cache, tokenizer, name):
    number = signal.Signals[name]
    process = start_build(large, cache)
    go(process)
    wait_until(lambda: any(path.stat().st_size for path in cache.glob("*.ids")))
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: the workers get it too
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert errors == ""
    wait_until(lambda: is_gone(process.pid), 10)
    assert names(cache, ".json") == []
    if number == signal.SIGINT:
        assert names(cache) == []
    expected, _ = tokenise(large, tokenizer, SFTRecipe())
    again, _ = tokenise(large, tokenizer, SFTRecipe(), cache_dir=cache)
    assert same_arrays(again, expected) and len(names(cache)) == 6


@pytest.mark.slow
def test_processes_that_start_at_once_build_once(large, cache):
    processes = [start_build(large, cache) for _ in range(3)]
    for process in processes:
        go(process)
    results = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, results
    answers = [out.split() for out, _ in results]
    assert sorted(answer[0] for answer in answers) == ["0", "0", "1"]
    assert len({tuple(answer[1:]) for answer in answers}) == 1
    waiting = f"waiting for another process that tokenises {large}\n"
    assert sorted(err for _, err in results) == ["", waiting, waiting]
    assert len(names(cache)) == 6


# --- where it cannot be written ---------------------------------------------------------------------------------------


class Full:
    """A file on a disk that is full after so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(bytes(data))
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def fail(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["first write", "later write", "fsync", "replace"])
def test_a_full_disk(source, cache, tokenizer, where, in_parallel, monkeypatch):
    enter = token_cache._Sink.__enter__

    def enter_full(sink):
        enter(sink)
        sink.file = Full(sink.file, 5000 if where == "later write" else 0)
        return sink

    if "write" in where:
        monkeypatch.setattr(token_cache._Sink, "__enter__", enter_full)
    else:
        monkeypatch.setattr(token_cache.os, where, fail)
    message = "cannot be written .No space left on device.: free space .* another folder with --cache_dir .none"
    with pytest.raises(OSError, match=message) as caught:
        SFTDataset(source, tokenizer, 60, cache_dir=cache)
    assert str(cache) in str(caught.value) and "\n" not in str(caught.value)
    assert names(cache) == []
    monkeypatch.undo()
    assert equal(SFTDataset(source, tokenizer, 60, cache_dir=cache), SFTDataset(source, tokenizer, 60))
    assert len(names(cache)) == 6


def test_a_cache_folder_that_is_a_file(tmp_path, source, tokenizer):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(OSError, match="the token cache in .* cannot be written .*--cache_dir"):
            SFTDataset(source, tokenizer, 60, cache_dir=folder)


@POSIX
@pytest.mark.skipif(os.name != "nt" and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_serves_what_it_holds(source, cache, tokenizer):
    SFTDataset(source, tokenizer, 60, cache_dir=cache)
    cache.chmod(0o555)
    try:
        assert equal(SFTDataset(source, tokenizer, 60, cache_dir=cache), SFTDataset(source, tokenizer, 60))
        with pytest.raises(PermissionError, match="cannot be written .*--cache_dir"):
            PretrainDataset(source, tokenizer, 60, cache_dir=cache)
    finally:
        cache.chmod(0o755)


def test_a_missing_file_is_named_as_ever(tmp_path, cache, tokenizer):
    with pytest.raises(FileNotFoundError, match="check the path"):
        SFTDataset(tmp_path / "none.jsonl", tokenizer, cache_dir=cache)
    assert not cache.exists() and jsonl.is_hub_name("org/name")
