"""The mixer: the design document's arithmetic, a fair sample, memory, reproducibility, and refusals."""

import gzip
import json
import os
import random
import tracemalloc
from collections import Counter

import pytest

from conftest import ROOT, run_script
from scripts.build_sft_mix import lines_of, reservoir

SCRIPT = ROOT / "scripts" / "build_sft_mix.py"


def row(text):
    return {"conversations": [{"role": "user", "content": text}, {"role": "assistant", "content": "好"}]}


def write(path, texts, make=row):
    path.write_text("".join(json.dumps(make(text)) + "\n" for text in texts), encoding="utf-8")
    return path


def mix(cwd, *flags, base="base.jsonl", code="code.jsonl", out="mix.jsonl", **options):
    paths = ["--base_path", base, "--code_path", code, "--out_path", out]
    return run_script(SCRIPT, *paths, *flags, cwd=cwd, **options)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "base.jsonl", [f"base {i}" for i in range(300)])
    write(tmp_path / "code.jsonl", [f"code {i}" for i in range(20)])
    return tmp_path


def texts_of(path):
    return [json.loads(line)["conversations"][0]["content"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_design_documents_numbers_give_75000_rows(tmp_path):
    write(tmp_path / "base.jsonl", [f"base {i}" for i in range(60_000)])
    write(tmp_path / "code.jsonl", [f"code {i}" for i in range(5000)])
    finished = mix(tmp_path, "--base_n", 50000, "--code_repeat", 5, "--seed", 42, out="new/sft_mix_75k.jsonl")
    assert finished.stdout.splitlines() == [
        "Base: sampled 50000 from 60000",
        "Code: 5000 * 5 = 25000",
        "Total mixed: 75000 -> new/sft_mix_75k.jsonl",
    ]
    counts = Counter(texts_of(tmp_path / "new" / "sft_mix_75k.jsonl"))
    assert sum(counts.values()) == 75_000
    assert Counter(counts.values()) == {1: 50_000, 5: 5000}
    assert all(count == (5 if text.startswith("code") else 1) for text, count in counts.items())
    assert os.listdir(tmp_path / "new") == ["sft_mix_75k.jsonl"]


def test_same_seed_same_bytes_from_any_folder(folder):
    flags = ("--base_n", 100, "--code_repeat", 2)
    assert mix(folder, *flags, out="a.jsonl", env={"PYTHONHASHSEED": "1"}).returncode == 0
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    again = mix(elsewhere, *flags, base=folder / "base.jsonl", code="../code.jsonl", out="../b.jsonl")
    assert again.returncode == 0, again.stderr
    assert mix(folder, *flags, "--seed", 7, out="c.jsonl").returncode == 0
    first, second, other = ((folder / name).read_bytes() for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    assert first == second != other
    assert first.endswith(b"\n") and first.count(b"\n") == 140 and b"\r" not in first
    assert "好".encode() in first


def test_rows_are_shuffled_together(folder):
    mix(folder, "--base_n", 100, "--code_repeat", 5)
    kinds = [text.startswith("code") for text in texts_of(folder / "mix.jsonl")]
    assert sum(kinds) == 100 and 30 < sum(kinds[:100]) < 70


def test_small_base_is_taken_whole_and_zero_repeat_means_base_only(folder):
    finished = mix(folder, "--code_repeat", 0)
    assert finished.stdout.splitlines() == [
        "Base: sampled 300 from 300",
        "Code: 20 * 0 = 0",
        "Total mixed: 300 -> mix.jsonl",
    ]
    assert sorted(texts_of(folder / "mix.jsonl")) == sorted(f"base {i}" for i in range(300))
    assert mix(folder, "--base_n", 0, "--code_repeat", 1).returncode == 0
    assert sorted(texts_of(folder / "mix.jsonl")) == sorted(f"code {i}" for i in range(20))


def test_reservoir_takes_every_item_equally_often():
    counts = Counter()
    for seed in range(4000):
        sample, available = reservoir((str(i) for i in range(20)), 5, random.Random(seed))
        assert available == 20 and len(set(sample)) == 5
        counts.update(sample)
    # expected 1000 each, standard deviation 27
    assert len(counts) == 20 and all(870 < count < 1130 for count in counts.values())
    assert reservoir(iter(()), 5, random.Random(0)) == ([], 0)


def test_base_is_streamed(tmp_path):
    path = write(tmp_path / "big.jsonl", [f"{i} " + "x" * 2000 for i in range(8000)])
    assert path.stat().st_size > 16 << 20
    tracemalloc.start()
    try:
        sample, available = reservoir(lines_of(path, "raise"), 50, random.Random(0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(sample), available) == (50, 8000)
    assert peak < 6 << 20


def test_rows_keep_their_content_whatever_their_format(folder):
    other = [
        {"input": "二加二", "output": "4"},
        {"conversations": [*row("q")["conversations"]], "source": "test", "weight": 0.5, "tags": ["é", "\ud800", None]},
    ]
    write(folder / "base.jsonl", other, make=lambda value: value)
    mix(folder, "--code_repeat", 0)
    mixed = [json.loads(line) for line in (folder / "mix.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(mixed, key=len) == other


def test_gzip_is_read(folder):
    with gzip.open(folder / "base.jsonl.gz", "wb") as file:
        file.write((folder / "base.jsonl").read_bytes())
    mix(folder, out="plain.jsonl")
    assert mix(folder, base="base.jsonl.gz").returncode == 0
    assert (folder / "mix.jsonl").read_bytes() == (folder / "plain.jsonl").read_bytes()


BAD_ROWS = [
    "{broken",
    json.dumps({"conversations": [{"role": "user", "content": None}, {"role": "assistant", "content": "a"}]}),
    json.dumps({"conversations": [{"role": "user", "content": "no reply"}]}),
    json.dumps({"conversations": [{"role": "wizard", "content": "a"}, {"role": "assistant", "content": "a"}]}),
    json.dumps({"text": "a pretrain row"}),
    json.dumps(row("half a character \ud800")),
]


@pytest.mark.parametrize("bad", BAD_ROWS, ids=["json", "null", "no reply", "role", "format", "surrogate"])
@pytest.mark.parametrize("name", ["base.jsonl", "code.jsonl"])
def test_bad_rows_stop_the_run_or_are_skipped(folder, bad, name):
    lines = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / name).write_text("".join([*lines[:3], bad + "\n", *lines[3:]]), encoding="utf-8")
    (folder / "mix.jsonl").write_text("older\n", encoding="utf-8")
    stopped = mix(folder)
    assert stopped.returncode == 2 and f"{name}:4: " in stopped.stderr and "Traceback" not in stopped.stderr
    assert (folder / "mix.jsonl").read_text(encoding="utf-8") == "older\n"
    assert not list(folder.glob("*.tmp"))
    skipped = mix(folder, "--on_bad_row", "skip")
    assert skipped.returncode == 0 and "1 of" in skipped.stderr
    assert skipped.stdout.splitlines()[-1] == "Total mixed: 400 -> mix.jsonl"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"out": "base.jsonl"}, "is the input"),
        ({"out": "./sub/../code.jsonl"}, "is the input"),
        ({"out": "sub"}, "is a folder"),
        ({"base": "missing.jsonl"}, "missing.jsonl"),
        ({"code": "empty.jsonl"}, "empty.jsonl"),
    ],
)
def test_bad_paths_are_one_line_and_change_nothing(folder, flags, reason):
    (folder / "sub").mkdir()
    (folder / "empty.jsonl").touch()
    before = {path: path.read_bytes() for path in folder.glob("*.jsonl")}
    finished = mix(folder, **flags)
    assert finished.returncode == 2 and reason in finished.stderr and "Traceback" not in finished.stderr
    assert {path: path.read_bytes() for path in folder.glob("*.jsonl")} == before


def test_a_link_to_the_input_is_refused(folder):
    try:
        os.link(folder / "base.jsonl", folder / "link.jsonl")
    except OSError as error:
        pytest.skip(f"no links here: {error}")
    assert "is the input" in mix(folder, out="link.jsonl").stderr


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--base_n", "-1"], "--base_n is -1"),
        (["--code_repeat", "-1"], "--code_repeat is -1"),
        (["--base_n", "0", "--code_repeat", "0"], "nothing would be written"),
        (["--on_bad_row", "ignore"], "--on_bad_row"),
    ],
)
def test_bad_flags(folder, flags, reason):
    finished = mix(folder, *flags)
    assert finished.returncode == 2 and reason in finished.stderr and "Traceback" not in finished.stderr
    assert not (folder / "mix.jsonl").exists()
