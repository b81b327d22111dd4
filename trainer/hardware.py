"""What the machine can do: device, precision, compiler and memory, chosen by what is there and said where it is not."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import torch

# --use_compile auto compiles from this many floating-point operations on. On a CPU compiling takes 10 to 30 s and makes
# a step 2 to 9 % faster (docs/benchmarks.md): it pays in a run of some ten minutes in bf16, some thirty in fp32. A GPU,
# where it was not measured here, does 1e16 in a minute or two.
COMPILE_FROM = {"cpu": 3e14, "cuda": 1e16}


def choose_device(wanted: str = "auto") -> str:
    """The device to use; a GPU that is there but that this torch cannot use is said, not passed over.

    Raises:
        ValueError: the wanted device does not exist here.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            try:
                (torch.zeros(1, device="cuda:0") + 1).item()
                return "cuda:0"
            except RuntimeError as error:  # a GPU that this build of torch has no kernels for
                print(f"the GPU cannot be used by torch {torch.__version__}, running on the CPU: {error}")
                return "cpu"
        if torch.backends.mps.is_available():
            return "mps"
        if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0:
            print(
                f"an NVIDIA GPU is here, but torch {torch.__version__} cannot use it: running on the CPU. "
                "`pip install -r requirements-torch-cu126.txt --force-reinstall` installs a torch that can"
            )
        return "cpu"
    try:
        kind = torch.device(wanted).type
    except RuntimeError:
        raise ValueError(f"no device is called {wanted!r}: pass --device auto, cpu, cuda:0 or mps") from None
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise ValueError(
            f"--device {wanted}, but torch {torch.__version__} has no {kind} here: pass --device cpu or auto"
        )
    return wanted


def choose_dtype(wanted: str, device: str) -> str:
    """The precision of the matrix products, for `auto` the fastest that is safe on that device.

    Raises:
        ValueError: float16 off CUDA, where there is no gradient scaler for it.
    """
    kind = torch.device(device).type
    if wanted == "float16" and kind != "cuda":
        raise ValueError(
            f"--dtype float16 needs a gradient scaler, which only CUDA has: pass bfloat16 or auto on {kind}"
        )
    if wanted != "auto":
        return wanted
    if kind == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if kind == "mps":
        return "bfloat16"
    return "bfloat16" if cpu_has_bf16() else "float32"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than fp32 ones: AMX or AVX512-BF16 on x86, BF16 on Linux Arm."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:  # no Linux: fp32 is right everywhere
        return False
    wanted = {"x86_64": {"amx_bf16", "avx512_bf16"}, "aarch64": {"bf16"}}.get(platform.machine(), set())
    return not wanted.isdisjoint(flags)


def why_no_compile(device: str) -> str | None:
    """Why torch.compile cannot be used here, or None: found out by compiling a function of one line."""

    def probe(x):
        return x.sin() + 1

    try:
        torch.compile(probe)(torch.ones(8, device=device))
    except Exception as error:  # dynamo, inductor, triton and the compilers have their own, without a common base
        return (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
        )
    finally:
        torch.compiler.reset()
    return None


def choose_compile(wanted: str, device: str, flops: float, say=print) -> bool:
    """Whether to compile: `wanted` is "0", "1" or "auto", which compiles where the run is long enough to gain by it.

    Args:
        flops: floating-point operations of the whole run. The choice depends on them and not on a measured time, so
            that two equal runs choose alike.
    """
    kind = torch.device(device).type
    if wanted == "0" or (wanted == "auto" and flops < COMPILE_FROM.get(kind, float("inf"))):
        return False
    if reason := why_no_compile(device):
        say(
            f"not compiled, so slower: torch.compile does not work here ({reason}). It needs a C++ compiler, "
            "such as g++, clang or on Windows MSVC; on a GPU triton too"
        )
        return False
    return True


def keep_freed_memory() -> None:
    """Have glibc keep large blocks that are freed, for the next step to take again.

    By default it gives each one back to the system, and getting it anew costs a page fault per 4 KB: as much time as
    writing a tensor, a tenth of a training step on a CPU. Does nothing where there is no glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_max = -1, -4  # the names' numbers in malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)  # no block gets a mapping of its own
    libc.mallopt(trim_threshold, -1)  # the heap is never cut at its end
