"""A script run inside the test process: from its command line to its exit status, without seconds of imports.

Whatever is not caught by the script itself comes out as an exception, so a traceback fails the test.

    done = run_inside("eval_llm.py", "--weight", "pretrain", "--prompt", "a", cwd=tmp_path)
"""

import io
import os
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

from conftest import ROOT


class Finished(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def stream(text=""):
    return io.TextIOWrapper(io.BytesIO(text.encode("utf-8")), encoding="utf-8", newline="\n")


def text_of(captured):
    captured.flush()
    return captured.buffer.getvalue().decode("utf-8")


def run_inside(script, *flags, cwd=ROOT, stdin=""):
    """Run ROOT/script as `python script flags` in the folder cwd; returns status, output and errors."""
    out, err = stream(), stream()
    before = os.getcwd(), sys.argv, sys.stdin, list(sys.path)
    os.chdir(cwd)
    sys.argv, sys.stdin = [str(script), *map(str, flags)], stream(stdin)
    status = 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    finally:
        os.chdir(before[0])
        sys.argv, sys.stdin, sys.path[:] = before[1:]
    return Finished(status, text_of(out), text_of(err))
