"""Runs Python that a model wrote, in a process of its own, under limits of time, memory and output.

The program gets an empty environment, a temporary working directory that is deleted afterwards, and an interpreter in
isolated mode (`python -I`). When it ends, or exceeds a limit, everything that it started is killed. What is in force
depends on the system; `active_guards` measures it from inside the sandbox instead of assuming it.

This stops accidents and clumsy code, not an attacker. It does NOT hide the file system: the program reads and writes
whatever the user who runs it may read and write. It does not filter system calls, the memory limit counts for each
process and not for all together, and where namespaces are missing the network stays open and a child that starts a
session of its own survives. For code from strangers use a container or a virtual machine.

    python -m model.sandbox file.py              print the active guards, then run the file
    python model/sandbox.py file.py --timeout 2 --memory_mb 256
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

POSIX = os.name == "posix"
FILE_LIMIT_MB = 16  # the largest file that the program may write
PROCESS_LIMIT = 64  # in force in a user namespace only: elsewhere it would count the user's other processes too

# Runs between the fork and the program: the limits and namespaces set here outlive execve. It is a source of its own,
# because Popen's preexec_fn may deadlock in a process that has threads.
BOOTSTRAP = """
import os, resource, sys

memory, cpu, file_size, processes = map(int, sys.argv[1:5])

def limit(name, value):
    kind = getattr(resource, name, None)
    if kind is None:
        return
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (value, value))
    except (OSError, ValueError):
        pass  # macOS refuses RLIMIT_AS; active_guards() shows what holds

def isolate():
    import ctypes
    libc = ctypes.CDLL(None)
    new_user, new_pid, new_net = 0x10000000, 0x20000000, 0x40000000
    return libc.unshare(new_user | new_pid | new_net) == 0

def relay(pid):
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os._exit(code if code >= 0 else 128 - code)

if sys.platform == "linux" and isolate():
    # the first child is process 1 of the namespace: when it ends, the kernel kills all that is left in there
    for _ in range(2):
        pid = os.fork()
        if pid:
            relay(pid)
    limit("RLIMIT_NPROC", processes)
limit("RLIMIT_AS", memory)
limit("RLIMIT_CPU", cpu)
limit("RLIMIT_FSIZE", file_size)
limit("RLIMIT_CORE", 0)
os.execve(sys.argv[5], sys.argv[5:], {})
"""

PROBE = """
import json, os, sys
facts = {"environment": [name for name in os.environ if name not in ("LC_CTYPE", "SYSTEMROOT")]}
if os.name == "posix":
    import resource
    facts["memory"] = resource.getrlimit(resource.RLIMIT_AS)[0]
    facts["cpu"] = resource.getrlimit(resource.RLIMIT_CPU)[0]
    facts["file"] = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
if sys.platform == "linux":
    facts["net"] = os.readlink("/proc/self/ns/net")
    facts["pid"] = os.readlink("/proc/self/ns/pid")
print(json.dumps(facts))
"""


@dataclass(frozen=True)
class SandboxResult:
    """What a program did.

    `returncode` is 128 + n when signal n ended it. `truncated`: it wrote more than the output limit and was killed.
    `stdout` and `stderr` hold at most the output limit in bytes each, decoded as UTF-8. `seconds` is wall time.
    """

    returncode: int
    stdout: str
    stderr: str
    timed_out: bool
    truncated: bool
    seconds: float

    @property
    def ok(self) -> bool:
        """True if the program ended by itself with exit code 0 within all limits."""
        return self.returncode == 0 and not self.timed_out and not self.truncated


class _Reader(threading.Thread):
    """Reads a pipe into memory up to a limit; past it, calls `on_overflow` once and drops the rest."""

    def __init__(self, pipe, limit, on_overflow):
        super().__init__(daemon=True)
        self.pipe, self.limit, self.on_overflow = pipe, limit, on_overflow
        self.data, self.overflow = bytearray(), False
        self.start()

    def run(self):
        while chunk := os.read(self.pipe.fileno(), 65536):
            room = self.limit - len(self.data)
            self.data += chunk[:room]
            if len(chunk) > room and not self.overflow:
                self.overflow = True
                self.on_overflow()

    def text(self):
        return bytes(self.data).decode("utf-8", errors="replace").replace("\r\n", "\n")


def run_python(
    code: str, timeout: float = 5.0, memory_mb: int = 512, output_limit: int = 65536, stdin: str = ""
) -> SandboxResult:
    """Run `code` as a program of its own and wait for its end.

    Args:
        code: Python source; a syntax error is the program's failure (exit code 1), not an exception here.
        timeout: seconds of wall time; the CPU time of each process is limited to the same, rounded up.
        memory_mb: address space of each process in MiB, where the system enforces it.
        output_limit: bytes kept of stdout and of stderr; a program that writes more is killed.
        stdin: text that the program can read; it then sees the end of the file.

    Raises:
        ValueError: if a limit is not positive.
    """
    for name, value in (("timeout", timeout), ("memory_mb", memory_mb), ("output_limit", output_limit)):
        if value <= 0:
            raise ValueError(f"{name} is {value}: it must be above zero")
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as input_file,
    ):
        Path(folder, "main.py").write_bytes(code.encode("utf-8", errors="replace"))
        input_file.write(stdin.encode("utf-8", errors="replace"))
        input_file.seek(0)
        process = _start(folder, input_file, timeout, memory_mb)
        kill = functools.partial(_kill_group, process)
        readers = [_Reader(pipe, output_limit, kill) for pipe in (process.stdout, process.stderr)]
        try:
            timed_out = not _wait(process, readers, started + timeout)
        finally:  # also when Ctrl-C interrupts the waiting: the program has a session of its own and does not see it
            kill()
            process.wait()
        for reader in readers:
            reader.join(1.0)  # an escaped child may hold the pipe open for ever
            if not reader.is_alive():
                reader.pipe.close()
    code_of_exit = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return SandboxResult(
        returncode=code_of_exit,
        stdout=readers[0].text(),
        stderr=readers[1].text(),
        timed_out=timed_out,
        truncated=any(reader.overflow for reader in readers),
        seconds=time.monotonic() - started,
    )


def _start(folder, input_file, timeout, memory_mb):
    program = [sys.executable, "-I", "-B", "-X", "utf8", str(Path(folder, "main.py"))]
    options = {"cwd": folder, "stdin": input_file, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if POSIX:
        limits = (memory_mb << 20, math.ceil(timeout), FILE_LIMIT_MB << 20, PROCESS_LIMIT)
        bootstrap = [sys.executable, "-I", "-S", "-c", BOOTSTRAP, *map(str, limits)]
        return subprocess.Popen(bootstrap + program, env={}, start_new_session=True, **options)
    # Windows starts no interpreter without SYSTEMROOT
    environment = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
    return subprocess.Popen(program, env=environment, creationflags=subprocess.CREATE_NEW_PROCESS_GROUP, **options)


def _wait(process, readers, deadline):
    """True if the process ended before the deadline. The end of its output wakes this at once, unlike polling."""
    while process.poll() is None:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        waiting = [reader for reader in readers if reader.is_alive()]
        if waiting:
            waiting[0].join(min(left, 0.05))
            continue
        try:
            process.wait(left)
        except subprocess.TimeoutExpired:
            return False
    return True


def _kill_group(process):
    """Kill the process and its descendants, also when the process itself has ended already."""
    if POSIX:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # nobody is left; macOS says so with EPERM
    elif process.poll() is None:
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, check=False)


@functools.lru_cache(maxsize=1)
def active_guards() -> list[str]:
    """One line for each guard, in force or not, as found by a program that looks at itself inside the sandbox."""
    result = run_python(PROBE, timeout=10.0)
    if not result.ok:
        raise RuntimeError(f"the sandbox cannot run Python here (exit code {result.returncode}): {result.stderr}")
    facts = json.loads(result.stdout)
    alone = _own_namespace(facts, "pid")
    if alone:
        children = "all killed with the program (own process namespace)"
    else:
        children = "killed with the program" + (
            ", unless they start a session of their own" if POSIX else " at timeout"
        )
    return [
        "wall time: limited, the whole process group is killed",
        f"children: {children}",
        f"CPU time: {'limited' if _finite(facts, 'cpu') else 'not limited (wall time is)'}",
        f"memory: {'limited for each process' if _finite(facts, 'memory') else 'not limited'}",
        "output: limited, a program that writes more is killed",
        f"file size: {f'at most {FILE_LIMIT_MB} MiB each' if _finite(facts, 'file') else 'not limited'}",
        f"environment: {'empty' if not facts['environment'] else 'passes ' + ', '.join(facts['environment'])}",
        "working directory: temporary, deleted afterwards",
        f"network: {'blocked (own network namespace)' if _own_namespace(facts, 'net') else 'not blocked'}",
        "file system: not blocked, the program has the rights of the user who runs it",
    ]


def _finite(facts, name):
    return 0 <= facts.get(name, -1) < 1 << 60  # no limit reads as -1 or as the largest integer


def _own_namespace(facts, kind):
    return kind in facts and facts[kind] != os.readlink(f"/proc/self/ns/{kind}")


def extract_code(text: str) -> str | None:
    """The Python code in a model's answer, or None.

    That is the first fenced block marked python (or py), else the first unmarked one; a block that is never closed
    goes to the end of the text. An answer without any fence counts as code if it parses as Python and does more than
    name a value: a plain word such as `Hello` parses too.
    """
    text = text.replace("\r\n", "\n")
    fences = re.findall(r"^[ \t]*```[ \t]*([\w+-]*)[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", text, re.MULTILINE | re.DOTALL)
    for marks in (("python", "py", "python3"), ("",)):
        for mark, block in fences:
            if mark.lower() in marks:
                return textwrap.dedent(block)
    if "```" in text:
        return None
    try:
        statements = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return text.strip() + "\n" if any(not isinstance(node, ast.Expr) for node in statements) else None


def judge_code(answer: str, check: str) -> dict:
    """{"ran", "right", "error"}: whether the answer holds code, it ends without error, and the check agrees.

    Args:
        answer: what a model wrote; check: Python that runs behind its code and fails, by assert, where it is wrong.
    """
    code = extract_code(answer)
    if code is None:
        return {"ran": False, "right": False, "error": "no code in the answer"}
    alone = run_python(code)
    if not alone.ok:
        return {"ran": False, "right": False, "error": last_line(alone) or "ended without success"}
    # printed last, so that code which ends the process before the check is not taken for right
    reached = secrets.token_hex(8)
    checked = run_python(f"{code}\n\n{check}\nprint({reached!r})\n")
    if checked.ok and checked.stdout.rstrip().endswith(reached):
        return {"ran": True, "right": True, "error": ""}
    return {"ran": True, "right": False, "error": last_line(checked) or "ended before the check"}


def last_line(result: SandboxResult) -> str:
    """What Python says at the end of its errors, or that the time was up."""
    if result.timed_out:
        return f"not done after {result.seconds:.0f} s"
    return result.stderr.strip().splitlines()[-1] if result.stderr.strip() else ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a Python file in the sandbox.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds of wall time and of CPU time")
    parser.add_argument("--memory_mb", type=int, default=512)
    parser.add_argument("--output_limit", type=int, default=65536, help="bytes of stdout and of stderr")
    args = parser.parse_args()
    try:
        code = args.file.read_text(encoding="utf-8")
        print("\n".join(active_guards()), flush=True)
        result = run_python(code, args.timeout, args.memory_mb, args.output_limit)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    sys.stdout.write(result.stdout)
    sys.stderr.write(result.stderr)
    notes = "".join(f", {note}" for note, on in (("timed out", result.timed_out), ("cut", result.truncated)) if on)
    print(f"exit code {result.returncode} after {result.seconds:.2f} s{notes}")
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
