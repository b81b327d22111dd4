"""The cleaner: what it repairs and drops and says, overlap with evaluation files, and that nothing is ever lost."""

import codecs
import gzip
import json
import os

import pytest
from broken_files import broken_file, chat, every_broken_file, run_main, write_rows

from conftest import ROOT, run_script
from scripts import clean_data


def clean(capsys, folder, *flags, inputs=("a.jsonl",), out="out.jsonl"):
    return run_main(clean_data, capsys, "--in", *(folder / name for name in inputs), "--out", folder / out, *flags)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- what is dropped and repaired -------------------------------------------------------------------------------------


def test_copies_are_dropped_across_files_and_formats(tmp_path, capsys):
    one, two = chat("one", "1"), chat("two", "2")
    write_rows(tmp_path / "a.jsonl", [one, two, one])
    other = [{"messages": two["conversations"]}, {"input": "one", "output": "1"}, chat("three", "3") | {"id": 7}]
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in other)
    report = tmp_path / "report.json"
    status, out, _ = clean(capsys, tmp_path, "--report", report, inputs=("a.jsonl", "b.jsonl.gz"))
    assert status == 0 and rows_of(tmp_path / "out.jsonl") == [one, two, other[2]]
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    assert out.splitlines() == [
        "[Clean] read 6 rows of 2 files",
        "[Clean] repaired: 0",
        "[Clean] dropped: 3",
        f"  exact duplicate: 3, {a}:3 of {a}:1, {b}:1 of {a}:2, {b}:2 of {a}:1",
        f"[Clean] kept 3 of 6 rows -> {tmp_path / 'out.jsonl'}",
    ]
    written = json.loads(report.read_text(encoding="utf-8"))
    assert (written["read"], written["kept"], written["repaired"]) == (6, 3, {})
    assert written["dropped"]["exact duplicate"]["count"] == 3


def test_what_training_refuses_is_dropped_under_its_cause(tmp_path, capsys):
    bad = [
        {"conversations": [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}]},
        chat("q", ""),
        {"conversations": [{"role": "robot", "content": "x"}]},
        {"conversations": [{"role": "user", "content": "x"}]},
        {"name": "foreign"},
    ]
    path = write_rows(tmp_path / "a.jsonl", [*bad, chat()])
    path.write_bytes(path.read_bytes() + b"{torn\n" + b"\xff\xfe\n" + b"[]\n")
    status, out, _ = clean(capsys, tmp_path, "--stage", "sft")
    assert status == 0 and rows_of(tmp_path / "out.jsonl") == [chat()]
    for cause, line in [
        *[("null content", 1), ("empty content", 2), ("unknown role", 3), ("no assistant turn", 4), ("missing key", 5)],
        *[("broken JSON", 7), ("wrong encoding", 8), ("not an object", 9)],
    ]:
        assert f"  {cause}: 1, {path}:{line}\n" in out


def test_repairs_lose_nothing(tmp_path, capsys):
    row = chat("  q  \n", "  code\n\tx \n\n", system="Be brief. ")
    nothing = chat("q2", "a2", system=" ")
    listed = chat("q3", "a3", system="")
    listed["conversations"][0]["tools"] = '[{"name": "f"}]'
    write_rows(tmp_path / "a.jsonl", [row, nothing, listed, {"messages": [{"from": "human", "value": "q4 "}]}])
    path = tmp_path / "a.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    status, out, _ = clean(capsys, tmp_path)
    assert status == 0 and rows_of(tmp_path / "out.jsonl") == [
        chat("  q", "  code\n\tx", system="Be brief."),
        chat("q2", "a2"),
        listed,
    ]
    assert "[Clean] repaired: 3\n" in out and f"  byte order mark: 1, {path}:1\n" in out
    assert f"  white space at the end: 1, {path}:1\n" in out and f"  empty system message: 1, {path}:2\n" in out
    assert not (tmp_path / "out.jsonl").read_bytes().startswith(codecs.BOM_UTF8)


def test_rows_that_differ_anywhere_are_no_copies(tmp_path, capsys):
    rows = [chat("q", "a"), chat("p", "a"), chat("q", "b"), chat("q", "a", system="s"), chat("q", "a", system="t")]
    write_rows(tmp_path / "a.jsonl", rows)
    assert clean(capsys, tmp_path)[0] == 0 and rows_of(tmp_path / "out.jsonl") == rows


def test_rows_that_are_equal_after_the_repair_are_copies(tmp_path, capsys):
    write_rows(tmp_path / "a.jsonl", [chat("q", "a"), chat("q", "a\n")])
    assert clean(capsys, tmp_path)[0] == 0 and rows_of(tmp_path / "out.jsonl") == [chat("q", "a")]


def test_rows_of_one_line_are_told_apart(tmp_path, capsys):
    rows = [chat("a", "1"), chat("a", "1"), chat("b", "2"), chat("", "2"), chat("c", "3")]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    assert clean(capsys, tmp_path, inputs=("a.json",))[0] == 0
    assert rows_of(tmp_path / "out.jsonl") == [rows[0], rows[2], rows[4]]


def test_texts_of_pretraining(tmp_path, capsys):
    write_rows(tmp_path / "a.jsonl", [{"text": "one "}, {"text": " "}, {"text": "one"}, {"text": "word " * 50}])
    status, out, _ = clean(capsys, tmp_path, "--max_len", 20)
    assert status == 0 and rows_of(tmp_path / "out.jsonl") == [{"text": "one"}]
    assert "longer than 20 tokens: 1" in out


def test_long_rows(tmp_path, capsys, tokenizer):
    from dataset.jsonl import to_messages
    from model.chat import render

    rows = [chat("q", "a " * i) for i in range(1, 30)]
    rows = [chat("q", row["conversations"][1]["content"].rstrip()) for row in rows]
    lengths = [len(render(tokenizer, to_messages(row)).input_ids) for row in rows]
    write_rows(tmp_path / "a.jsonl", rows)
    limit = lengths[14]
    assert clean(capsys, tmp_path, "--max_len", limit)[0] == 0
    short = [row for row, length in zip(rows, lengths, strict=True) if length <= limit]
    assert rows_of(tmp_path / "out.jsonl") == short and 0 < len(short) < len(rows)
    status, out, _ = clean(capsys, tmp_path, "--max_len", limit, "--long", "keep", "--force")
    assert status == 0 and rows_of(tmp_path / "out.jsonl") == rows
    assert f"longer than {limit} tokens, kept: {len(rows) - len(short)}" in out


def test_near_duplicates(tmp_path, capsys):
    long = "The quick brown fox jumps over the lazy dog and runs away from it." * 5
    rows = [chat("q", long), chat("q", long + "!"), chat("q", "Something else altogether.")]
    write_rows(tmp_path / "a.jsonl", rows)
    assert clean(capsys, tmp_path)[0] == 0 and len(rows_of(tmp_path / "out.jsonl")) == 3
    status, out, _ = clean(capsys, tmp_path, "--near_dup", 1, "--force")
    assert status == 0 and rows_of(tmp_path / "out.jsonl") == [rows[0], rows[2]] and "near duplicate: 1, " in out


# --- overlap with evaluation files ------------------------------------------------------------------------------------

WORDS = [f"word{i}" for i in range(40)]


@pytest.mark.parametrize(
    "question, dropped",
    [
        (" ".join(WORDS[5:18]), True),  # 13 in a row
        (" ".join(WORDS[5:17]), False),
        (" ".join(["x", *WORDS[5:17], "y"]), False),
        ("Well: " + ", ".join(WORDS[5:18]).upper() + "?!", True),  # case and punctuation count for nothing
        (" ".join(WORDS[5:11] + ["x"] + WORDS[11:18]), False),
        ("天空是蓝色的因为阳光被散射", True),
        ("天空是蓝色的因为阳光散射", False),
        ("Short question?", True),  # shorter than an n-gram: only as a whole
        ("A short question?", False),
    ],
)
def test_rows_that_overlap_with_an_evaluation_are_dropped(tmp_path, capsys, question, dropped):
    evaluation = [{"prompt": " ".join(WORDS)}, {"question": "为什么天空是蓝色的，因为阳光被散射了"}]
    evaluation += [chat("short  question", "yes")]
    write_rows(tmp_path / "eval.jsonl", evaluation)
    for row in (chat(question, "a"), chat("q", question)):
        write_rows(tmp_path / "a.jsonl", [row, chat("kept", "answer")])
        status, out, _ = clean(capsys, tmp_path, "--against", tmp_path / "eval.jsonl", "--force")
        assert status == 0 and rows_of(tmp_path / "out.jsonl") == [row, chat("kept", "answer")][dropped:]
        assert ("overlap with --against: 1" in out) == dropped


def test_ngram_and_system_prompts(tmp_path, capsys):
    system = " ".join(WORDS[:30])
    write_rows(tmp_path / "eval.jsonl", [{"prompt": " ".join(WORDS[20:30]), "system": system}])
    rows = [chat("q", "a", system=system), chat("b " + " ".join(WORDS[20:25]), "c")]
    write_rows(tmp_path / "a.jsonl", rows)
    against = ("--against", tmp_path / "eval.jsonl", "--force")
    assert clean(capsys, tmp_path, *against)[0] == 0 and rows_of(tmp_path / "out.jsonl") == rows
    assert clean(capsys, tmp_path, *against, "--ngram", 5)[0] == 0 and rows_of(tmp_path / "out.jsonl") == rows[:1]


def test_an_evaluation_file_without_known_texts_is_an_error(tmp_path, capsys):
    write_rows(tmp_path / "a.jsonl", [chat()])
    write_rows(tmp_path / "eval.jsonl", [{"prompt": "x"}, {"stuff": "x"}])
    status, _, err = clean(capsys, tmp_path, "--against", tmp_path / "eval.jsonl")
    assert status == 2 and f"{tmp_path / 'eval.jsonl'}:2: missing key" in err and not (tmp_path / "out.jsonl").exists()


# --- nothing is lost --------------------------------------------------------------------------------------------------


def test_no_file_is_overwritten_without_force_and_the_input_never(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", [chat(), chat()])
    os.link(path, tmp_path / "same.jsonl")
    before = path.read_bytes()
    for out in ("a.jsonl", "same.jsonl", "../" + tmp_path.name + "/a.jsonl"):
        status, _, err = clean(capsys, tmp_path, "--force", out=out)
        assert status == 2 and "is the input" in err and path.read_bytes() == before
    (tmp_path / "out.jsonl").write_text("mine", encoding="utf-8")
    for flags in ((), ("--report", tmp_path / "out.jsonl")):
        status, _, err = clean(capsys, tmp_path, *flags)
        assert status == 2 and "--force" in err and (tmp_path / "out.jsonl").read_text(encoding="utf-8") == "mine"
    status, _, err = clean(capsys, tmp_path, "--force", "--report", tmp_path / "out.jsonl")
    assert status == 2 and "both" in err
    assert clean(capsys, tmp_path, "--force")[0] == 0 and rows_of(tmp_path / "out.jsonl") == [chat()]


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), 130), (OSError("disk full"), 2)])
def test_an_interrupted_run_leaves_no_half_file(tmp_path, capsys, monkeypatch, error, status):
    write_rows(tmp_path / "a.jsonl", [chat("q", str(i)) for i in range(50)])
    (tmp_path / "out.jsonl").write_text("mine", encoding="utf-8")
    true_dumps, calls = json.dumps, []

    def dumps(*args, **options):
        calls.append(1)
        if len(calls) > 70:  # 50 of the inspection, 20 of the writing
            raise error
        return true_dumps(*args, **options)

    monkeypatch.setattr(json, "dumps", dumps)
    found, _, err = clean(capsys, tmp_path, "--force")
    monkeypatch.undo()
    assert found == status and len(calls) == 71 and ("stopped" in err or "disk full" in err)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == "mine"


def test_an_input_that_changes_meanwhile_is_an_error(tmp_path, capsys, monkeypatch):
    path, true_choose = write_rows(tmp_path / "a.jsonl", [chat("q", "a"), chat("q2", "b")]), clean_data.Rows.choose

    def choose(*args):
        write_rows(path, [chat("q3", "c"), chat("q2", "b"), chat("q4", "d")])
        return true_choose(*args)

    monkeypatch.setattr(clean_data.Rows, "choose", choose)
    status, _, err = clean(capsys, tmp_path)
    assert status == 2 and "changed while" in err and os.listdir(tmp_path) == ["a.jsonl"]


def test_nothing_left_is_an_error(tmp_path, capsys):
    write_rows(tmp_path / "a.jsonl", [chat("q", "a " * 50)])
    status, _, err = clean(capsys, tmp_path, "--max_len", 20)
    assert status == 2 and "no row of 1 is left" in err and "longer than 20 tokens" in err
    assert os.listdir(tmp_path) == ["a.jsonl"]


@every_broken_file
def test_broken_files_are_named_in_one_line(tmp_path, capsys, name):
    path, message = broken_file(tmp_path, name)
    status, out, err = clean(capsys, tmp_path, "--stage", "sft", inputs=(name,))
    assert status == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert message in err and name.split(".")[0] in err and not (tmp_path / "out.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("folder", [".", "trainer", "scripts"])
def test_runs_everywhere(tmp_path, folder):
    up = "" if folder == "." else "../"
    flags = ("--in", f"{up}dataset/sample/sft.jsonl", "--out", tmp_path / "a.jsonl")
    finished = run_script(f"{up}scripts/clean_data.py", *flags, cwd=ROOT / folder)
    assert finished.returncode == 0, finished.stderr
    assert "[Clean] kept " in finished.stdout and finished.stderr == "" and rows_of(tmp_path / "a.jsonl")
