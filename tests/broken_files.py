"""Files that no script may stumble over, and how a script is run here: what it printed, and its exit status."""

import gzip
import json

import pytest

from trainer.arguments import friendly_errors

ROW = {"conversations": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]}


def chat(question="你好", answer="你好！", system=None):
    """A row of one turn."""
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": turns}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


LINE = (json.dumps(ROW, ensure_ascii=False) + "\n").encode()
# name of the file -> its bytes (None: there is none), and what the message must hold besides the file's name
BROKEN = {
    "missing.jsonl": (None, "no file at"),
    "empty.jsonl": (b"", "empty (0 bytes)"),
    "blank.jsonl": (b"\n \n", "holds no rows"),
    "binary.jsonl": (bytes(range(128, 256)) * 40, "binary.jsonl:1: wrong encoding"),
    "cut.jsonl.gz": (gzip.compress(b"".join(LINE[:-1] + b" " * i + b"\n" for i in range(900)))[:-40], "truncated"),
    "utf16.jsonl": (LINE.decode().encode("utf-16"), "utf16.jsonl:1: wrong encoding"),
    "foreign.jsonl": (b'{"name": "x", "version": 3}\n', "foreign.jsonl:1: missing key"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer"),
    "list.jsonl": (b"[1, 2]\n", ":1: "),
    "torn.json": (b"[" + LINE[:-1] + b", " + LINE[:40], "torn.json:1: broken JSON"),
    "letter.xlsx": (b"PK\3\4", "unknown kind"),
}


def broken_file(folder, name):
    content, message = BROKEN[name]
    if content is not None:
        (folder / name).write_bytes(content)
    return folder / name, message


def run_main(module, capsys, *flags):
    """(exit status, stdout, stderr) of a script, in this process."""
    status = 0
    try:
        with friendly_errors():
            status = module.main(module.parse_args([str(flag) for flag in flags])) or 0
    except SystemExit as left:
        status = left.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


every_broken_file = pytest.mark.parametrize("name", BROKEN)
