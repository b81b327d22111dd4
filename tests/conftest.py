"""What the tests share: the repository root on sys.path, the shipped tokenizer, and how scripts are run."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# two test processes at most share a small machine, and one thread makes floating-point sums repeatable
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# pictures and samples cost more than the tiny runs themselves; the tests that look at them ask for them
os.environ.setdefault("MINIGPT_CURVES", "0")
os.environ.setdefault("MINIGPT_SAMPLE_PROMPTS", "none")
# token ids of files that are gone after the test would stay in the user's cache
os.environ["MINIMIND_CACHE_DIR"] = tempfile.mkdtemp(prefix="minimind-test-cache-")
atexit.register(shutil.rmtree, os.environ["MINIMIND_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "model")


def run_script(*command, cwd=ROOT, env=None, timeout=300, stdin=""):
    """Run `python COMMAND...` as a user would; returns the finished process with text output."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
    )
