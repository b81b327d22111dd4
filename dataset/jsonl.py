"""Rows of training data from a file or the hub, each one checked, a bad one reported as `path:line: reason`.

Files are read as a stream, one row in memory at a time. `.jsonl` and `.json` (one list of objects, or an object per
line) may be gzipped; `.parquet` and `.arrow` files and names on the Hugging Face hub go through `datasets`.

    for line, row in read_rows("dataset/sft_mini_512.jsonl", validate=check_conversation):   # stops at a bad row
    for line, row in read_rows("dataset/sft_mini_512.jsonl.gz", on_bad_row="skip"):          # counts bad rows
    for line, row in read_rows("org/name:train"):                                            # org/name[:config][:split]

The text of every reason is "kind: what was found; what to do". Skipped rows are counted by their kind.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES = {"human": "user", "gpt": "assistant"}
TEXT_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
TABLE_SUFFIXES = (".parquet", ".arrow")
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?::([\w.+%\[\]:-]+))?")
SAMPLE_DIR = Path(__file__).resolve().parent / "sample"
CHUNK_BYTES = 1 << 20
MAX_ROW_CHARS = 1 << 26  # a list element that is longer than this is a broken file, not a row


class BadRow(ValueError):
    """A row that cannot be used: `path`, `line` (1-based; of a table the row), `reason`; reads "path:line: reason"."""

    def __init__(self, path: str, line: int, reason: str):
        super().__init__(path, line, reason)
        self.path, self.line, self.reason = path, line, reason

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


class RowTally:
    """What became of the rows of a source: a bad one is raised or counted, and the counts are said once at the end.

    Attributes:
        rows: good rows so far. skipped: Counter of bad rows by kind. skipped_lines: the first few of their lines.
        first_bad: the first of them.
    """

    def __init__(self, path: str | Path, on_bad_row: str = "raise"):
        if on_bad_row not in ("raise", "skip"):
            raise ValueError(f"on_bad_row is {on_bad_row!r}: use 'raise' or 'skip'")
        self.path, self.skips = str(path), on_bad_row == "skip"
        self.rows, self.skipped, self.skipped_lines = 0, Counter(), []
        self.first_bad: BadRow | None = None

    def reject(self, line: int, reason: str) -> None:
        """A bad row: counted, or raised as BadRow."""
        bad = BadRow(self.path, line, reason)
        if not self.skips:
            raise bad
        self.first_bad = self.first_bad or bad
        self.skipped[reason.split(":")[0]] += 1
        if len(self.skipped_lines) < 5:
            self.skipped_lines.append(line)

    def warning(self) -> str:
        """One line about the skipped rows, "" if there are none."""
        if not self.skipped:
            return ""
        bad = self.skipped.total()
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.skipped.most_common())
        lines = ", ".join(map(str, self.skipped_lines)) + (", ..." if bad > len(self.skipped_lines) else "")
        return f"{self.path}: {bad:,} of {bad + self.rows:,} rows skipped ({kinds}), at line {lines}"

    def finish(self) -> None:
        """After the last row: the warning goes to stderr (of the main process only); no good row at all is an error."""
        if self.rows == 0 and self.first_bad is not None:
            raise ValueError(f"none of {self.skipped.total():,} rows is usable; the first: {self.first_bad}")
        if self.rows == 0:
            raise ValueError(f"{self.path} holds no rows: get the file again{sample_hint(self.path)}")
        if self.skipped and is_main_process():
            print(self.warning(), file=sys.stderr)


class RowReader(RowTally):
    """Iterator of (line number, row); a `RowTally` of what it has read.

    Attributes:
        raw: what is iterated over before anything is checked, for those who parse elsewhere: (line number, bytes of
            the line or a decoded value). They count by `rows`, `reject` and `finish` themselves.
        size: bytes on disk of a file that is read as text, else 0. position: bytes of it that were read so far.
    """

    def __init__(self, path: str | Path, on_bad_row: str = "raise", validate: Callable[[dict], None] | None = None):
        super().__init__(path, on_bad_row)
        self.size, self.position = 0, 0
        self._validate = validate
        self.raw = self._source()
        self._iterator = self._checked()

    def __iter__(self) -> RowReader:
        return self

    def __next__(self) -> tuple[int, dict]:
        return next(self._iterator)

    def _source(self) -> Iterator[tuple[int, object]]:
        """Line numbers with the raw bytes of a line, or with a decoded value; the file itself is checked right away."""
        path = Path(self.path)
        if not path.exists() and is_hub_name(self.path):
            return _hub_rows(self.path)
        size = check_file(path)
        if path.suffix.lower() in TABLE_SUFFIXES:
            return _table_rows(path)
        if not path.name.lower().endswith(TEXT_SUFFIXES):
            known = " ".join(TEXT_SUFFIXES + TABLE_SUFFIXES)
            raise ValueError(f"{path} is of an unknown kind: rename or convert it to one of {known}")
        self.size = size
        if ".json" in path.suffixes and _first_character(path) == b"[":
            return self._list_elements(path)
        return self._lines(path)

    def _lines(self, path: Path) -> Iterator[tuple[int, bytes]]:
        with open_bytes(path) as (file, raw):
            for number, line in enumerate(file, start=1):
                self.position = raw.tell()
                if not line.isspace():
                    yield number, line

    def _list_elements(self, path: Path) -> Iterator[tuple[int, object]]:
        with open_bytes(path) as (file, raw):
            for item in _ListStream(file, self.path).elements():
                self.position = raw.tell()
                yield item

    def _checked(self) -> Iterator[tuple[int, dict]]:
        for line, raw in self.raw:
            try:
                row = to_object(raw)
                if self._validate is not None:
                    self._validate(row)
            except ValueError as error:
                self.reject(line, str(error))
                continue
            self.rows += 1
            yield line, row
        self.finish()


def read_rows(path: str | Path, on_bad_row: str = "raise", validate: Callable[[dict], None] | None = None) -> RowReader:
    """Stream the rows of a file or of a hub dataset as (line number, row).

    Args:
        path: .jsonl, .json, either with .gz, .parquet, .arrow, or a hub name `org/name[:config][:split]`.
        on_bad_row: "raise" stops at the first bad row; "skip" leaves bad rows out, counts them in `.skipped` of the
            returned iterator and prints one line to stderr at the end.
        validate: called with each row; says by ValueError that the row is bad ("kind: found; what to do").

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: at once, with what to do about it.
        ValueError: for a file that is empty, damaged, of an unknown kind, a git-lfs pointer, or has only bad rows.
        BadRow: for a bad row under "raise", while reading.
    """
    return RowReader(path, on_bad_row, validate)


# --- the file ---------------------------------------------------------------------------------------------------------


def is_main_process() -> bool:
    """Whether this process is the one of its run that speaks (torchrun numbers them)."""
    return os.environ.get("RANK", "0") == "0"


def is_hub_name(path: str | Path) -> bool:
    """Whether `path` is written like `org/name[:config][:split]` and cannot be meant as a file of this machine."""
    match = HUB_NAME.fullmatch(str(path))
    if match is None or Path(path).exists():
        return False
    folder, name = match[1].split("/")
    known = TEXT_SUFFIXES + TABLE_SUFFIXES + (".txt", ".gz", ".csv")
    return folder not in (".", "..") and not Path(folder).is_dir() and not name.lower().endswith(known)


def sample_hint(path: str | Path) -> str:
    """How to go on with the sample file of the same kind; "" where there is none."""
    name = Path(path).name.lower()
    for kind in ("pretrain", "identity", "sft", ".txt"):
        sample = f"{kind}.jsonl" if kind != ".txt" else "plain.txt"
        if kind in name and (SAMPLE_DIR / sample).exists():
            return f", or try the sample data: dataset/sample/{sample}"
    return ""


def check_file(path: Path) -> int:
    """Bytes of a file that can be read; raises an error that says what to do for everything that cannot."""
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.name.lower().endswith(TEXT_SUFFIXES + TABLE_SUFFIXES))
        found = f"name one of its files: {', '.join(inside[:5])}" if inside else "name a file"
        raise IsADirectoryError(f"{path} is a folder: {found}")
    if not path.exists():
        raise FileNotFoundError(f"no file at {path}: check the path{sample_hint(path)}")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except PermissionError as error:
        raise PermissionError(f"{path} may not be read by this user: change its permissions (chmod u+r)") from error
    if not start:
        raise ValueError(f"{path} is empty (0 bytes): get the file again{sample_hint(path)}")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the data: fetch the file itself with `git lfs pull`")
    return path.stat().st_size


@contextmanager
def open_bytes(path: Path) -> Iterator[tuple[io.BufferedIOBase, io.BufferedIOBase]]:
    """Open a file, unpacked if it is a .gz, as (what to read, the file on disk, whose tell() shows the progress)."""
    with path.open("rb") as raw:
        try:
            if path.suffix.lower() == ".gz":
                with gzip.GzipFile(fileobj=raw) as unpacked, io.BufferedReader(unpacked, CHUNK_BYTES) as file:
                    yield file, raw
            else:
                yield raw, raw
        except EOFError as error:
            raise ValueError(f"{path} is a truncated .gz, its end is missing: copy or download it again") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is not a sound .gz ({error}): get it again, or drop .gz from its name") from error


def _first_character(path: Path) -> bytes:
    with open_bytes(path) as (file, _):
        return file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()[:1]


class _ListStream:
    """The elements of one JSON list with their line numbers, read in pieces: the list is never in memory as a whole.

    After a broken element nobody can tell where the next one begins, so that is raised even if bad rows are skipped.
    """

    def __init__(self, file: io.BufferedIOBase, path: str):
        self.file, self.path = file, path
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.text, self.at, self.line, self.ended = "", 0, 1, False  # self.line is the line of self.text[self.at]

    def elements(self) -> Iterator[tuple[int, object]]:
        if self._peek() == "\ufeff":
            yield 1, codecs.BOM_UTF8  # reported like the same mark in a file of lines
            self.at += 1
        opening = self._peek()  # skips to it
        assert opening == "[", opening
        self.at += 1
        if self._peek() != "]":
            yield self._element()
            while self._peek() == ",":
                self.at += 1
                yield self._element()
        if self._peek() != "]":
            self._fail(f"expected , or ] but found {self._peek() or 'the end of the file'!r}")
        self.at += 1
        if self._peek():
            self._fail(f"{self._peek()!r} after the end of the list")

    def _fail(self, found: str) -> None:
        raise BadRow(self.path, self.line, f"broken JSON: {found}; what follows cannot be read, so repair the file")

    def _more(self) -> bool:
        """Drop what was used and read on; False at the end of the file."""
        data = self.file.read(CHUNK_BYTES)
        try:
            piece = self.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n", self.at) + data.count(b"\n", 0, max(error.start, 0))
            raise BadRow(self.path, line, not_utf8(error)) from error
        self.text, self.at = self.text[self.at :] + piece, 0
        self.ended = not data
        return not self.ended

    def _peek(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            begin = self.at
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            self.line += self.text.count("\n", begin, self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended or not self._more():
                return ""

    def _element(self) -> tuple[int, object]:
        self._peek()
        line, decoder = self.line, json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # else a number could go on in the next piece
                    break
            except (ValueError, RecursionError) as error:
                if self.ended or not self._may_go_on(error):
                    self._fail(error.msg if isinstance(error, json.JSONDecodeError) else str(error))
            self._more()
        self.line += self.text.count("\n", self.at, end)
        self.at = end
        return line, value

    def _may_go_on(self, error: ValueError | RecursionError) -> bool:
        """Whether the element may only be cut at the end of what was read: the error is there, or a string is open."""
        if not isinstance(error, json.JSONDecodeError) or len(self.text) - self.at > MAX_ROW_CHARS:
            return False
        return error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16


def _table_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Rows of a .parquet or .arrow file, numbered from 1."""
    from datasets import load_dataset  # takes a second to import, so only where it is needed

    try:
        table = load_dataset(path.suffix[1:].lower(), data_files=str(path), split="train", streaming=True)
        yield from enumerate(table, start=1)
    except Exception as error:  # the libraries below raise their own classes, without a common base
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]} ({error}): get the file again") from error


def _hub_rows(name: str) -> Iterator[tuple[int, dict]]:
    """Rows of `org/name[:config][:split]` on the hub, numbered from 1; the split is "train" where none is named."""
    from datasets import load_dataset

    repository, first, second = HUB_NAME.fullmatch(name).groups()
    config, split = (first, second) if second else (None, first or "train")
    try:
        yield from enumerate(load_dataset(repository, config, split=split, streaming=True), start=1)
    except Exception as error:  # the network's errors and the library's have no common base
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise OSError(
            f"no file {name}, and no such dataset could be read from the hub ({reason}): check the name, the split "
            f"{split!r} and the network, or pass a file"
        ) from error


# --- the row ----------------------------------------------------------------------------------------------------------


def not_utf8(error: UnicodeDecodeError) -> str:
    """The reason for bytes that are not UTF-8."""
    return (
        f"wrong encoding: byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file, for example with "
        "`iconv -f GB18030 -t UTF-8`"
    )


def decode_line(raw: bytes) -> str:
    """Text of a line; raises ValueError for a byte order mark and for anything but UTF-8."""
    if raw.startswith(codecs.BOM_UTF8):
        raise ValueError("byte order mark: the line starts with the bytes ef bb bf; save the file as UTF-8 without BOM")
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw:
        raise ValueError("wrong encoding: this looks like UTF-16; convert the file with `iconv -f UTF-16 -t UTF-8`")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(error)) from error


def parse_row(raw: bytes) -> object:
    """The JSON value of a line; raises ValueError with the reason."""
    text = decode_line(raw)
    try:
        return json.loads(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        hint = "name the file .json if it is one list" if text.strip() == "[" else "repair or delete the line"
        raise ValueError(f"broken JSON: {error.msg} at column {error.colno}; {hint}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 nested lists
        raise ValueError(f"broken JSON: {error}; repair or delete the line") from error


def to_object(raw: object) -> dict:
    """The object that a line's bytes or a decoded value is; raises ValueError with the reason."""
    row = parse_row(raw) if isinstance(raw, bytes) else raw
    if not isinstance(row, dict):
        raise ValueError(f'not an object: found {_kind_of(row)}; a row is written {{"key": value}}')
    return row


def read_batch(
    rows: Iterable[tuple[int, object]], read: Callable[[dict], object], stop_at_bad: bool
) -> tuple[list[tuple[int, object]], list[tuple[int, str]]]:
    """Parse raw rows and hand each to `read`: (line, what it returned) of the good ones, (line, reason) of the bad.

    With `stop_at_bad` the rows behind the first bad one are not looked at.
    """
    good, bad = [], []
    for line, raw in rows:
        try:
            good.append((line, read(to_object(raw))))
        except ValueError as error:
            bad.append((line, str(error)))
            if stop_at_bad:
                break
    return good, bad


def _kind_of(value: object) -> str:
    names = {type(None): "null", str: "a string", list: "a list", dict: "an object", bool: "true or false"}
    return names.get(type(value), "a number")


def check_text(value: object, where: str) -> str:
    """`value` if it is text that can be encoded and is not blank; raises ValueError that names `where`."""
    if value is None:
        raise ValueError(f"null content: {where} is null; give it text or delete the row")
    if not isinstance(value, str):
        raise ValueError(f"wrong type: {where} is {_kind_of(value)}; write it as one string")
    if not value.strip():
        raise ValueError(f"empty content: {where} is blank; give it text or delete the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # an escape like \ud83d whose other half was cut off
        raise ValueError(f"wrong encoding: {where} has half of a surrogate pair; repair or delete the row") from error
    return value


def _missing(row: dict, wanted: str) -> ValueError:
    return ValueError(f"missing key: wanted {wanted}, found {', '.join(map(str, row)) or 'none'}; rename or add it")


def pretrain_text(row: dict) -> str:
    """The text of {"text"} or {"content"}; raises ValueError with the reason."""
    for key in ("text", "content"):
        if key in row:
            return check_text(row[key], f"'{key}'")
    raise _missing(row, "'text'")


def check_pretrain(row: dict) -> None:
    """Validator of `read_rows` for pretraining rows."""
    pretrain_text(row)


def trainable_messages(row: dict) -> list[dict]:
    """`to_messages` of a row of supervised fine-tuning; raises ValueError where it has no reply to learn from."""
    messages = to_messages(row)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no assistant turn: there is nothing to learn; add a reply or delete the row")
    return messages


def check_conversation(row: dict) -> None:
    """Validator of `read_rows` for rows of supervised fine-tuning: all that `to_messages` asks, and a reply."""
    trainable_messages(row)


def to_messages(row: dict) -> list[dict]:
    """The conversation of a row in one form, whatever its format.

    Accepts {"conversations": [...]} or {"messages": [...]} of {"role", "content"} (or {"from", "value"}) with roles
    system, user (human), assistant (gpt), tool; or {"input", "output"}, {"instruction", "output"} with optional
    "instruction", "system", "history" ([[user, assistant], ...]).

    Returns:
        list of {"role", "content"}; an assistant's also with "reasoning_content" (str) and "tool_calls"
        ([{"name", "arguments"}]), the system's with "tools" (list of objects), where the row has them.

    Raises:
        ValueError: "kind: what was found; what to do".
    """
    lists = [row[key] for key in ("conversations", "messages") if key in row]
    if not lists:
        return _with_tools(_from_input_output(row), row)
    turns = next((found for found in lists if found is not None), None)
    if turns is None:
        raise ValueError("null content: the list of messages is null; delete the row")
    if not isinstance(turns, list):
        raise ValueError(f"wrong type: the messages are {_kind_of(turns)}; write a list of objects")
    if not turns:
        raise ValueError("empty content: the list of messages is empty; delete the row")
    return _with_tools([_message(turn, number) for number, turn in enumerate(turns, start=1)], row)


def _from_input_output(row: dict) -> list[dict]:
    if "output" not in row or ("input" not in row and "instruction" not in row):
        raise _missing(row, "'conversations', 'messages', or 'input' and 'output'")
    messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": check_text(row["system"], "'system'")})
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise ValueError("wrong type: 'history' is not a list of [user, assistant] pairs; write it so")
    for pair in history:
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": check_text(text, f"{role} text in 'history'")})
    parts = [check_text(row[key], f"'{key}'") for key in ("instruction", "input") if row.get(key)]
    question = "\n".join(parts) if parts else check_text(row.get("input"), "'input'")
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": check_text(row["output"], "'output'")})
    return messages


def _message(turn: object, number: int) -> dict:
    """One message in the common form."""
    where = f"message {number}"
    if not isinstance(turn, dict):
        raise ValueError(f"wrong type: {where} is {_kind_of(turn)}; write an object with 'role' and 'content'")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role is None or ("content" not in turn and "value" not in turn and not turn.get("tool_calls")):
        raise ValueError(f"missing key: {where} needs 'role' and 'content', found {', '.join(turn)}; add it")
    role = ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(f"unknown role: {where} has {role!r}; use {', '.join(ROLES)}")
    message = {"role": role, "content": content}
    if role == "assistant":
        _add_reply_fields(message, turn, where)
    if role == "system" and (tools := _tools_of(turn, where)):
        message["tools"] = tools
    says_enough = "tool_calls" in message or "tools" in message
    if content is None and says_enough:
        content = ""
    blank = isinstance(content, str) and not content.strip()
    if not (blank and (says_enough or role == "tool")):
        check_text(content, f"{where} ({role})")
    return message | {"content": content}


def _add_reply_fields(message: dict, turn: dict, where: str) -> None:
    if turn.get("reasoning_content"):
        message["reasoning_content"] = check_text(turn["reasoning_content"], f"'reasoning_content' of {where}")
    calls = _objects(turn.get("tool_calls"), f"'tool_calls' of {where}")
    if calls:
        message["tool_calls"] = [_tool_call(call, where) for call in calls]


def _tool_call(call: dict, where: str) -> dict:
    """{"name", "arguments"} from that or from OpenAI's {"function": {"name", "arguments": JSON text}}."""
    call = call.get("function") or call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError(f"missing key: 'tool_calls' of {where} has a call without 'name'; add it")
    return {"name": call["name"], "arguments": _json(call.get("arguments") or {}, f"'arguments' of {where}")}


def _tools_of(holder: dict, where: str) -> list[dict]:
    """Tools under "tools", or under "functions" as older MiniMind files have it."""
    return _objects(holder.get("tools"), f"'tools' of {where}") or _objects(
        holder.get("functions"), f"'functions' of {where}"
    )


def _with_tools(messages: list[dict], row: dict) -> list[dict]:
    """Tools that stand beside the messages go where the template looks for them: on the system message."""
    if tools := _tools_of(row, "the row"):
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": ""})
        messages[0].setdefault("tools", tools)
    return messages


def _json(value: object, where: str) -> object:
    """`value`, parsed if it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON: {where}: {error}; repair or delete the row") from error


def _objects(value: object, where: str) -> list[dict]:
    """A list of objects given as such or as JSON text; [] for nothing."""
    value = _json(value or [], where)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"wrong type: {where} is not a list of objects; write one")
    return value
