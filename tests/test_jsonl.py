"""Reading rows: every format gives the same rows, and every bad file or row is reported with place, reason, remedy."""

import gzip
import io
import json
import os
import pickle
import re
import tracemalloc
from pathlib import Path

import pytest

from dataset import jsonl
from dataset.jsonl import BadRow, check_conversation, check_pretrain, is_hub_name, read_rows, to_messages

GOOD = {"conversations": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "hello"}]}
TEXT = {"text": "good"}


def conversation(*turns):
    return {"conversations": list(turns)}


def turn(role="assistant", content="hello", **extra):
    return {"role": role, "content": content, **extra}


def dump(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def write(path, data):
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


ROWS = [{"text": f"行 {i} “é” \n 🙂", "n": [i, {"a": None}]} for i in range(50)]


# --- every format gives the same rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "A.JSONL"])
def test_lines_in_every_file_kind(tmp_path, name):
    path = write(tmp_path / name, dump(*ROWS))
    assert list(read_rows(path)) == list(enumerate(ROWS, start=1))
    assert list(read_rows(str(path))) == list(enumerate(ROWS, start=1))


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_list_of_objects(tmp_path, monkeypatch, name, indent, chunk):
    """Read in pieces of any size, a list gives the elements and the lines that the whole text gives."""
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", chunk)
    text = " \n" + json.dumps(ROWS, ensure_ascii=False, indent=indent) + "\n\n"
    path = write(tmp_path / name, text.encode("utf-8"))
    found = list(read_rows(path))
    assert [row for _, row in found] == ROWS
    if indent == 2:
        lines = text.split("\n")
        assert [number for number, _ in found] == [i for i, line in enumerate(lines, start=1) if line == "  {"]
    if indent is None:
        assert {number for number, _ in found} == {2}


def test_blank_lines_and_windows_line_ends(tmp_path):
    data = b"\n" + dump(TEXT) + b"\r\n  \t\n" + dump(TEXT).replace(b"\n", b"\r\n") + dump(TEXT).rstrip(b"\n")
    assert list(read_rows(write(tmp_path / "a.jsonl", data))) == [(2, TEXT), (5, TEXT), (6, TEXT)]


def test_line_separators_inside_of_a_string_end_no_row(tmp_path):
    row = {"text": "a\u2028b\u0085c\x1cd"}
    assert list(read_rows(write(tmp_path / "a.jsonl", dump(row, row)))) == [(1, row), (2, row)]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_tables_go_through_datasets(tmp_path, monkeypatch, suffix):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / f"rows.{suffix}"
    table = datasets.Dataset.from_list([GOOD, conversation(turn("system", "s", tools="[]"), turn())])
    if suffix == "parquet":
        table.to_parquet(str(path))
    else:
        table.save_to_disk(str(tmp_path / "saved"))
        next((tmp_path / "saved").glob("*.arrow")).rename(path)
    found = list(read_rows(path, validate=check_conversation))
    assert [number for number, _ in found] == [1, 2]
    # a table fills absent keys with null; the messages are the same
    assert to_messages(found[0][1]) == to_messages(GOOD)
    with pytest.raises(BadRow, match=r"rows\.\w+:1: missing key: wanted 'text'"):
        list(read_rows(path, validate=check_pretrain))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_damaged_table_is_an_error(tmp_path, suffix):
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=f"cannot be read as {suffix}.*get the file again"):
        list(read_rows(write(tmp_path / f"a.{suffix}", b"nonsense" * 99)))


def test_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("org/name", "org/name:test", "a-b/c.d_e:config:train[:1%]"):
        assert is_hub_name(name), name
    for name in ("folder/name", "org/name.jsonl", "a/b/c", "./name", "../name", "name", "/org/name", "C:\\data\\a"):
        assert not is_hub_name(name), name


def test_the_hub_is_asked_for_the_right_thing(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or [TEXT, {"txt": "x"}])
    assert next(read_rows("org/name")) == (1, TEXT)
    assert next(read_rows("org/name:test")) == (1, TEXT)
    with pytest.raises(BadRow, match="^org/name:zh:test:2: missing key"):
        list(read_rows("org/name:zh:test", validate=check_pretrain))
    expected = [(None, "train"), (None, "test"), ("zh", "test")]
    assert asked == [(("org/name", config), {"split": split, "streaming": True}) for config, split in expected]


def test_no_network_is_a_clear_error():
    pytest.importorskip("datasets")  # conftest.py sets HF_HUB_OFFLINE
    with pytest.raises(OSError, match="no file nobody/nothing.*hub.*check the name.*network"):
        list(read_rows("nobody/nothing"))


# --- bad files --------------------------------------------------------------------------------------------------------


def test_missing_file_names_the_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "SAMPLE_DIR", tmp_path)
    (tmp_path / "sft.jsonl").write_text("x")
    (tmp_path / "pretrain.jsonl").write_text("x")
    for name, sample in (("sft_mini_512.jsonl", "sft"), ("full_sft.jsonl", "sft"), ("pretrain_hq.jsonl", "pretrain")):
        with pytest.raises(FileNotFoundError, match=f"check the path, or try .*dataset/sample/{sample}.jsonl"):
            read_rows(tmp_path / name / "x" / name)
    for name in ("identity.jsonl", "other.jsonl"):  # no sample of that kind there
        with pytest.raises(FileNotFoundError, match="check the path$"):
            read_rows(tmp_path / "no" / name)


def test_folder_names_its_files(tmp_path):
    write(tmp_path / "b.jsonl", dump(TEXT))
    with pytest.raises(IsADirectoryError, match="is a folder: name one of its files: b.jsonl"):
        read_rows(tmp_path)


def test_unreadable_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", dump(TEXT))
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything, and so may a Windows user

        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match="a.jsonl may not be read by this user: change its permissions"):
        read_rows(path)


BAD_FILES = {
    "empty": ("a.jsonl", b"", r"is empty \(0 bytes\): get the file again"),
    "only blank lines": ("a.jsonl", b"\n \n", "holds no rows"),
    "empty list": ("a.json", b"[ ]", "holds no rows"),
    "empty gz": ("a.jsonl.gz", gzip.compress(b""), "holds no rows"),
    "git-lfs": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer.*lfs pull"),
    "git-lfs gz": ("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    "truncated gz": ("a.jsonl.gz", gzip.compress(os.urandom(5000).hex().encode())[:-400], "truncated .gz.*again"),
    "no gz": ("a.jsonl.gz", dump(TEXT), "not a sound .gz.*drop .gz"),
    "damaged gz": ("a.jsonl.gz", gzip.compress(dump(TEXT) * 99)[:-8] + b"\0" * 8, "not a sound .gz"),
    "csv": ("a.csv", b"a,b\n", "unknown kind: rename or convert it to one of .jsonl .json"),
    "tail of a list": ("a.json", b'[{"a": 1}] {"a": 2}', "a.json:1: broken JSON: .* after the end of the list"),
    "no comma": ("a.json", b'[{"a": 1}\n{"a": 2}]', "a.json:2: broken JSON: expected , or ]"),
    "list without end": ("a.json", b'[{"a": 1},\n{"a": 2}', "a.json:2: broken JSON: .*the end of the file"),
    "list cut in a string": ("a.json", b'[{"a": 1},\n{"a": "xy', "a.json:2: broken JSON: Unterminated string"),
    "broken element": (
        "a.json",
        b'[{"a": 1},\n{"a" 2}, {"a": 3}]' + b" " * 99,
        "a.json:2: broken JSON.*repair the file",
    ),
}


@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
@pytest.mark.parametrize("name, data, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_an_error_whatever_is_done_with_bad_rows(tmp_path, name, data, message, on_bad_row):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(read_rows(tmp_path / name, on_bad_row))


def test_a_file_with_only_bad_rows_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", b"x\ny\n")
    with pytest.raises(ValueError, match=r"none of 2 rows is usable; the first: .*a.jsonl:1: broken JSON"):
        list(read_rows(path, "skip"))


def test_on_bad_row_is_checked(tmp_path):
    with pytest.raises(ValueError, match="'ignore': use 'raise' or 'skip'"):
        read_rows(write(tmp_path / "a.jsonl", dump(TEXT)), "ignore")


# --- bad rows ---------------------------------------------------------------------------------------------------------

GBK = '{"text": "中文"}'.encode("gbk")
BAD_LINES = {  # the bytes of a line, the kind, what else the reason says
    "broken JSON": (b'{"text": "a"', "broken JSON", "column 13; repair or delete"),
    "two rows on a line": (b'{"text": "a"} {"text": "b"}', "broken JSON", "Extra data"),
    "single quotes": (b"{'text': 'a'}", "broken JSON", "double quotes"),
    "deep nesting": (b"[" * 200_000, "broken JSON", "recursion"),
    "endless number": (b'{"text": ' + b"1" * 5000 + b"}", "broken JSON", "4300"),
    "pretty list": (b"[", "broken JSON", "name the file .json"),
    "BOM": (b"\xef\xbb\xbf" + dump(TEXT).strip(), "byte order mark", "UTF-8 without BOM"),
    "GBK": (GBK, "wrong encoding", "0xd6 is not UTF-8; .*iconv"),
    "UTF-16": ('{"text": "中文"}'.encode("utf-16"), "wrong encoding", "UTF-16.*iconv"),
    "UTF-16 without BOM": ('{"text": "a"}'.encode("utf-16-le"), "wrong encoding", "UTF-16"),
    "Latin-1": ('{"text": "é"}'.encode("latin-1"), "wrong encoding", "0xe9"),
    "half a surrogate pair": (rb'{"text": "\ud83d"}', "wrong encoding", "surrogate"),
    "a list": (b'["a"]', "not an object", "found a list"),
    "a string": (b'"a"', "not an object", "found a string"),
    "a number": (b"3", "not an object", "found a number"),
    "null": (b"null", "not an object", "found null"),
    "missing key": (b'{"txt": "a", "b": 1}', "missing key", "wanted 'text', found txt, b"),
    "empty object": (b"{}", "missing key", "found none"),
    "text is a number": (b'{"text": 3}', "wrong type", "'text' is a number"),
    "text is a list": (b'{"text": ["a"]}', "wrong type", "'text' is a list"),
    "null text": (b'{"text": null}', "null content", "'text' is null"),
    "empty text": (b'{"text": ""}', "empty content", "'text' is blank"),
    "blank text": (rb'{"text": " \n\u3000"}', "empty content", "delete the row"),
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
@pytest.mark.parametrize("data, kind, detail", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line(tmp_path, capsys, data, kind, detail, name):
    path = write(tmp_path / name, dump(TEXT) + data + b"\n" + dump(TEXT))
    rows = read_rows(path, validate=check_pretrain)
    assert next(rows) == (1, TEXT)
    with pytest.raises(BadRow, match=f"(?s)^{re.escape(str(path))}:2: {kind}: .*{detail}") as caught:
        next(rows)
    assert (caught.value.path, caught.value.line) == (str(path), 2)
    assert ";" in caught.value.reason  # what to do

    rows = read_rows(path, "skip", check_pretrain)
    assert list(rows) == [(1, TEXT), (3, TEXT)]
    assert rows.skipped == {kind: 1}
    assert capsys.readouterr().err == f"{path}: 1 of 3 rows skipped (1 {kind}), at line 2\n"


def test_bom_at_the_start_of_a_file(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + dump(TEXT, TEXT))
    with pytest.raises(BadRow, match="a.jsonl:1: byte order mark: .*save the file as UTF-8 without BOM"):
        list(read_rows(path))
    assert list(read_rows(path, "skip")) == [(2, TEXT)]
    path = write(tmp_path / "a.json", b"\xef\xbb\xbf" + json.dumps([TEXT, TEXT]).encode())
    with pytest.raises(BadRow, match="a.json:1: byte order mark"):
        list(read_rows(path))
    assert list(read_rows(path, "skip")) == [(1, TEXT), (1, TEXT)]  # the mark is before the list, not in a row


def test_wrong_encoding_in_a_list(tmp_path):
    path = write(tmp_path / "a.json", b'[{"text": "a"},\n' + GBK + b"]")
    with pytest.raises(BadRow, match="a.json:2: wrong encoding: byte 0xd6"):
        list(read_rows(path))


@pytest.mark.parametrize("chunk", [1, 19, 1 << 20])  # 19: between the two digits of 12
def test_bad_elements_of_a_list(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", chunk)
    path = write(tmp_path / "a.json", b'[{"text": "a"},\n 12,\n null, {"text": ""},\n{"text": "b"}]')
    with pytest.raises(BadRow, match="a.json:2: not an object: found a number"):
        list(read_rows(path))
    rows = read_rows(path, "skip", check_pretrain)
    assert list(rows) == [(1, {"text": "a"}), (4, {"text": "b"})]
    assert rows.skipped == {"not an object": 2, "empty content": 1}


def test_a_broken_element_is_reported_without_reading_the_whole_list(monkeypatch):
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", 100)
    file = io.BytesIO(b'[{"text" "a"},' + b'{"text": "b"},' * 1000 + b"{}]")
    with pytest.raises(BadRow, match="a.json:1: broken JSON: Expecting ':' delimiter"):
        list(jsonl._ListStream(file, "a.json").elements())
    assert file.tell() == 100


USER = turn("user", "hi")
BAD_CONVERSATIONS = {
    "no key": ({"text": "a"}, "missing key: wanted 'conversations', 'messages', or 'input' and 'output', found text"),
    "null list": ({"conversations": None}, "null content: the list of messages"),
    "a string": ({"conversations": "hi"}, "wrong type: the messages are a string"),
    "empty list": ({"conversations": []}, "empty content: the list of messages is empty"),
    "message is text": (conversation("hi", turn()), "wrong type: message 1 is a string"),
    "unknown role": (conversation(USER, turn("robot")), "unknown role: message 2 has 'robot'; use system, user,"),
    "role in capitals": (conversation(USER, turn("Assistant")), "unknown role: message 2 has 'Assistant'"),
    "role is a list": (conversation(USER, turn(["user"])), "unknown role: message 2"),
    "null role": (conversation(USER, turn(None)), "missing key: message 2 needs 'role'"),
    "no role": (conversation({"content": "a"}), "missing key: message 1 needs 'role' and 'content', found content"),
    "no content": (conversation(USER, {"role": "assistant"}), "missing key: message 2"),
    "null content": (conversation(USER, turn(content=None)), r"null content: message 2 \(assistant\) is null"),
    "null user": (conversation(turn("user", None), turn()), r"null content: message 1 \(user\) is null"),
    "null tool": (conversation(USER, turn("tool", None), turn()), r"null content: message 2 \(tool\)"),
    "empty reply": (conversation(USER, turn(content="")), r"empty content: message 2 \(assistant\)"),
    "blank user": (conversation(turn("user", " \n"), turn()), r"empty content: message 1 \(user\)"),
    "empty system": (conversation(turn("system", ""), USER, turn()), r"empty content: message 1 \(system\)"),
    "content is a list": (conversation(USER, turn(content=[{"type": "text"}])), r"wrong type: message 2 .* a list"),
    "content is a number": (conversation(USER, turn(content=4)), r"wrong type: message 2 \(assistant\) is a number"),
    "surrogate": (conversation(USER, turn(content="\ud83d")), "wrong encoding: message 2"),
    "no assistant": (conversation(turn("system", "s"), USER), "no assistant turn: there is nothing to learn"),
    "broken tools": (conversation(turn("system", "s", tools="[{"), USER, turn()), "broken JSON: 'tools' of message 1"),
    "broken functions": (
        conversation(turn("system", "s", functions="{,"), USER, turn()),
        "broken JSON: 'functions' of message 1",
    ),
    "tools is a number": (conversation(turn("system", "s", tools="3"), USER, turn()), "wrong type: 'tools' of message"),
    "broken calls": (conversation(USER, turn(tool_calls="[")), "broken JSON: 'tool_calls' of message 2"),
    "call without name": (conversation(USER, turn(tool_calls=[{"a": 1}])), "missing key: 'tool_calls' of message 2"),
    "broken arguments": (
        conversation(USER, turn(tool_calls=[{"name": "f", "arguments": "{"}])),
        "broken JSON: 'arguments' of message 2",
    ),
    "reasoning is a list": (conversation(USER, turn(reasoning_content=["a"])), "wrong type: 'reasoning_content' of me"),
    "tools of the row": ({**GOOD, "tools": "x"}, "broken JSON: 'tools' of the row"),
    "no output": ({"input": "a"}, "missing key"),
    "only output": ({"output": "a"}, "missing key"),
    "null output": ({"input": "a", "output": None}, "null content: 'output' is null"),
    "empty output": ({"input": "a", "output": ""}, "empty content: 'output' is blank"),
    "null input": ({"input": None, "output": "a"}, "null content: 'input' is null"),
    "empty input": ({"instruction": "", "input": "", "output": "a"}, "empty content: 'input' is blank"),
    "input is a list": ({"input": ["a"], "output": "a"}, "wrong type: 'input' is a list"),
    "bad history": ({"input": "a", "output": "b", "history": ["x"]}, "wrong type: 'history'"),
    "null in history": ({"input": "a", "output": "b", "history": [["x", None]]}, "null content: assistant text in"),
}


@pytest.mark.parametrize("row, message", BAD_CONVERSATIONS.values(), ids=BAD_CONVERSATIONS)
def test_bad_conversation(tmp_path, row, message):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (GOOD, row, GOOD)), encoding="utf-8")
    with pytest.raises(BadRow, match=f"a.jsonl:2: {message}") as caught:
        list(read_rows(path, validate=check_conversation))
    rows = read_rows(path, "skip", check_conversation)
    assert [number for number, _ in rows] == [1, 3]
    assert rows.skipped == {caught.value.reason.split(":")[0]: 1}


def test_skipped_rows_are_counted_by_kind_and_named(tmp_path, capsys):
    bad = [b"{\n", b'{"text": null}\n', b'{"text": null}\n', b"[]\n", b'{"text": 1}\n', b'{"text": null}\n']
    path = write(tmp_path / "a.jsonl", dump(TEXT) + b"".join(bad) + dump(TEXT) * 1000)
    rows = read_rows(path, "skip", check_pretrain)
    assert len(list(rows)) == rows.rows == 1001
    assert rows.skipped == {"null content": 3, "broken JSON": 1, "not an object": 1, "wrong type": 1}
    warning = capsys.readouterr().err
    assert warning == rows.warning() + "\n"
    assert "6 of 1,007 rows skipped (3 null content, 1 broken JSON" in warning
    assert warning.endswith("at line 2, 3, 4, 5, 6, ...\n")
    assert rows.position == rows.size == path.stat().st_size


def test_a_file_without_bad_rows_gives_no_warning(tmp_path, capsys):
    rows = read_rows(write(tmp_path / "a.jsonl", dump(TEXT)), "skip")
    assert list(rows) == [(1, TEXT)] and rows.warning() == capsys.readouterr().err == ""


def test_bad_row_survives_pickling():
    """A DataLoader worker sends its errors to the main process pickled."""
    copy = pickle.loads(pickle.dumps(BadRow("a.jsonl", 3, "kind: reason")))
    assert (str(copy), copy.line) == ("a.jsonl:3: kind: reason", 3)


# --- one form for all conversations -----------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"name": "f", "arguments": {"a": 1}}
SAME = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
WITH_TOOLS = [{"role": "system", "content": "", "tools": [TOOL]}, *SAME]
GOOD_CONVERSATIONS = {
    "conversations": (conversation(turn("user", "q"), turn("assistant", "a")), SAME),
    "messages": ({"messages": SAME}, SAME),
    "the null one of two": ({"conversations": None, "messages": SAME}, SAME),
    "human and gpt": (conversation({"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}), SAME),
    "aliases as role": (conversation(turn("human", "q"), turn("gpt", "a")), SAME),
    "input, output": ({"input": "q", "output": "a"}, SAME),
    "instruction, output": ({"instruction": "q", "input": "", "output": "a"}, SAME),
    "alpaca": (
        {"instruction": "q", "input": "x", "output": "a"},
        [{"role": "user", "content": "q\nx"}, {"role": "assistant", "content": "a"}],
    ),
    "system and history": (
        {"system": "s", "history": [["q0", "a0"]], "input": "q", "output": "a"},
        [{"role": "system", "content": "s"}, turn("user", "q0"), turn("assistant", "a0"), *SAME],
    ),
    "nulls for what is absent": (
        conversation(
            {"role": "user", "content": "q", "tools": None, "tool_calls": None, "reasoning_content": None},
            {"role": "assistant", "content": "a", "tools": None, "tool_calls": None, "reasoning_content": None},
        ),
        SAME,
    ),
    "reasoning": (
        conversation(turn("user", "q"), turn(content="a", reasoning_content="because")),
        [SAME[0], {"role": "assistant", "reasoning_content": "because", "content": "a"}],
    ),
    "tools as JSON text": (conversation(turn("system", "", tools=json.dumps([TOOL])), *SAME), WITH_TOOLS),
    "tools as a list": (conversation(turn("system", None, tools=[TOOL]), *SAME), WITH_TOOLS),
    "functions": (conversation(turn("system", "", functions=json.dumps([TOOL])), *SAME), WITH_TOOLS),
    "tools of the row": ({"messages": SAME, "tools": json.dumps([TOOL])}, WITH_TOOLS),
    "tools of the row and a system message": (
        {"messages": [turn("system", "s"), *SAME], "tools": [TOOL]},
        [{"role": "system", "content": "s", "tools": [TOOL]}, *SAME],
    ),
    "calls as JSON text": (
        conversation(SAME[0], turn(content="", tool_calls=json.dumps([CALL])), turn("tool", "")),
        [SAME[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, turn("tool", "")],
    ),
    "OpenAI's calls": (
        conversation(
            SAME[0],
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
        ),
        [SAME[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}],
    ),
    "unknown keys": ({"id": 3, "messages": [{**m, "id": 1} for m in SAME]}, SAME),
}


@pytest.mark.parametrize("row, messages", GOOD_CONVERSATIONS.values(), ids=GOOD_CONVERSATIONS)
def test_formats_of_conversations(row, messages):
    before = json.dumps(row)
    check_conversation(row)
    assert to_messages(row) == messages
    assert json.dumps(row) == before  # the row itself is left alone


def test_pretrain_text_may_be_called_content():
    check_pretrain({"content": "a", "id": 3})
    assert jsonl.pretrain_text({"content": "a"}) == "a"


def test_the_examples_of_the_data_page_are_good_rows():
    """Every JSON row that dataset.md shows passes the check of its format."""
    text = (Path(jsonl.__file__).parent / "dataset.md").read_text(encoding="utf-8")
    decoder, shown = json.JSONDecoder(), {check_pretrain: 0, check_conversation: 0}
    for match in re.finditer(r"^    (?=\{)", text, flags=re.MULTILINE):
        row, _ = decoder.raw_decode(text, match.end())
        # else a message in a row that is broken into lines, or the settings of a mix
        if "role" not in row and "default" not in row:
            check = check_pretrain if "text" in row else check_conversation
            check(row)
            shown[check] += 1
    assert shown == {check_pretrain: 2, check_conversation: 5}


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    row = {"text": "x" * 1000}
    data = dump(row) * 20_000 if "jsonl" in name else json.dumps([row] * 20_000).encode()
    path = write(tmp_path / name, data)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(path)) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(data) / 3, f"{peak:,} bytes for a file of {len(data):,}"
