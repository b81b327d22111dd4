"""What the machine can do: when a run is compiled, and memory that is kept."""

import platform
import sys

import pytest

from conftest import run_script
from trainer import hardware
from trainer.hardware import COMPILE_FROM, choose_compile

WORKS, FAILS = (lambda device: None), (lambda device: "no C++ compiler")


@pytest.mark.parametrize(
    "wanted, flops, reason, compiled",
    [
        ("0", 1e30, WORKS, False),
        ("1", 1.0, WORKS, True),
        ("1", 1e30, FAILS, False),
        ("auto", COMPILE_FROM["cpu"] * 0.9, WORKS, False),
        ("auto", COMPILE_FROM["cpu"] * 1.1, WORKS, True),
        ("auto", COMPILE_FROM["cpu"] * 1.1, FAILS, False),
    ],
)
def test_compile_where_it_pays_and_works(wanted, flops, reason, compiled, monkeypatch):
    said = []
    monkeypatch.setattr(hardware, "why_no_compile", reason)
    assert choose_compile(wanted, "cpu", flops, said.append) is compiled
    failed = reason is FAILS and (wanted == "1" or flops > COMPILE_FROM["cpu"])
    assert len(said) == failed and all("no C++ compiler" in line for line in said)


def test_a_short_run_does_not_even_try(monkeypatch):
    monkeypatch.setattr(hardware, "why_no_compile", lambda device: pytest.fail("tried"))
    assert not choose_compile("auto", "cpu", 1.0) and not choose_compile("auto", "mps", 1e30)


FAULTS = """
import resource, sys, torch
sys.path.insert(0, {root!r})
from trainer.hardware import keep_freed_memory
if {keep}:
    keep_freed_memory()
for _ in range(20):
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_kept_memory_costs_no_page_faults(tmp_path):
    """A block of 64 MB, taken and freed ten times: 16,384 pages each time, or none."""
    faults = []
    for keep in (False, True):
        script = tmp_path / "faults.py"
        script.write_text(FAULTS.format(root=str(hardware.Path(hardware.__file__).parents[1]), keep=keep), "utf-8")
        done = run_script(script)
        assert done.returncode == 0, done.stderr
        faults.append(int(done.stdout))
    assert faults[0] > 1000 and faults[1] < faults[0] / 100  # (huge pages make fewer, larger faults)
