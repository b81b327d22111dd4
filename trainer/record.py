"""The run directory: a folder of its own for each run, with what was asked for and with what code it was done.

out/runs/pretrain_512-20260131-181502/
    config.json  metrics.jsonl  summary.json  curves.png  ...
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import torch

from model.weights import versions, write_json

GIT_SECONDS = 5.0
SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD)$")


# --- the folder -------------------------------------------------------------------------------------------------------


def open_folder(runs_dir: str | Path, name: str, previous: str | None = None) -> Path:
    """The folder of a run: `{name}-YYYYmmdd-HHMMSS`, new, or the one that a resumed run had.

    Args:
        previous: name of the folder that the run had before it was resumed; a new one is made where it is gone.

    Raises:
        OSError: no folder can be made there.
    """
    runs_dir = Path(runs_dir)
    runs_dir.mkdir(parents=True, exist_ok=True)
    # looked for and not joined: a checkpoint may come from anywhere, and say ../..
    for folder in runs_dir.iterdir() if previous else []:
        if folder.name == previous and folder.is_dir():
            return folder
    base = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in count(1):
        folder = runs_dir / (base if number == 1 else f"{base}-{number}")
        try:
            folder.mkdir()  # one process alone can make it: no other one gets the same
        except FileExistsError:
            continue
        return folder


def write_config(folder: str | Path, content: dict) -> Path:
    """Write `config.json`, or `config-2.json` and so on where there is one: each resume leaves its own."""
    for number in count(1):
        path = Path(folder) / ("config.json" if number == 1 else f"config-{number}.json")
        if not path.exists():
            write_json(path, content)
            return path


def write_summary(folder: str | Path, content: dict) -> Path:
    """Write `summary.json`, in place of the one before."""
    path = Path(folder) / "summary.json"
    write_json(path, content)
    return path


# --- what the run was made with ---------------------------------------------------------------------------------------


def code_version(root: str | Path) -> dict:
    """{"commit": hex, "changed": whether tracked files differ from it, "digest": sha256 of the code that trains}.

    commit and changed are None where there is no git, or none for this folder.
    """
    root, digest = Path(root), hashlib.sha256()
    for path in sorted(path for part in ("model", "dataset", "trainer") for path in (root / part).rglob("*.py")):
        # line ends as git stores them: the same code gives the same digest on Windows
        content = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    commit, changed = _git_state(root)
    return {"commit": commit, "changed": changed, "digest": digest.hexdigest()}


def _git_state(root: Path) -> tuple[str | None, bool | None]:
    """(commit, whether tracked files have been changed), from one call of git."""
    if not (root / ".git").exists():  # (a folder above may be under git for reasons of its own)
        return None, None
    # without the monitor that a repository's own settings can name: it is a command, and slow to start
    command = ["git", "-c", "core.fsmonitor=false", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=GIT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a disk that takes its time
        return None, None
    if done.returncode:
        return None, None
    head = re.search(r"^# branch\.oid ([0-9a-f]{40,64})$", done.stdout, re.MULTILINE)
    changed = any(line and not line.startswith("#") for line in done.stdout.split("\n"))
    return (head.group(1) if head else None), changed


def environment() -> dict:
    """Versions, machine, command line and our own environment variables: what a run depends on beside its arguments."""
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    ours = {name: value for name, value in os.environ.items() if name.startswith(("MINIGPT_", "MINIMIND_"))}
    return {
        "versions": {**versions(), "numpy": np.__version__, "cuda": torch.version.cuda},
        "platform": platform.platform(),
        "cpu": {"model": cpu_model(), "count": os.cpu_count(), "threads": torch.get_num_threads()},
        "gpus": [{"name": gpu.name, "memory_gb": round(gpu.total_memory / 1e9, 2)} for gpu in gpus],
        "command": [sys.executable, *sys.argv],
        "variables": {name: "(set)" if SECRET.search(name) else value for name, value in sorted(ours.items())},
    }


def cpu_model() -> str:
    """The processor's name as its maker gives it, where the system tells."""
    try:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS).stdout.strip()
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()
