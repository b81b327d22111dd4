"""What is measured beside the loss: how far the weights move, what the blocks put out, how busy the machine is.

The two probes leave their results on the device as tensors, so that measuring never waits for a GPU: who writes the log
line fetches them.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

try:
    import psutil
except ImportError:  # optional: see requirements-monitor.txt
    psutil = None

GB = 1e9
LATE_DATA, IDLE_GPU, EMPTY_BATCH = 0.4, 0.5, 0.6


# --- weights ----------------------------------------------------------------------------------------------------------


class UpdateProbe:
    """The norm of the parameters, and the share of it by which one update changes them.

    Some 1e-3 is usual for AdamW; 1e-5 hardly learns, 1e-1 forgets. Between `before` and `after` it holds a copy of the
    parameters, at a time when the activations are gone.
    """

    def __init__(self, parameters):
        self.parameters, self.copies = list(parameters), None

    @torch.no_grad()
    def before(self) -> None:
        """Keep the parameters as they are."""
        self.copies = torch._foreach_mul(self.parameters, 1.0)

    @torch.no_grad()
    def after(self) -> torch.Tensor:
        """fp32 [2]: norm of the parameters now, and norm of their change since `before` divided by it."""
        torch._foreach_sub_(self.copies, self.parameters)
        norms = [torch.stack(torch._foreach_norm(tensors)).float() for tensors in (self.parameters, self.copies)]
        self.copies = None
        norm, change = torch.stack([torch.linalg.vector_norm(each) for each in norms])
        return torch.stack([norm, change / norm.clamp(min=torch.finfo(torch.float32).tiny)])


# --- activations ------------------------------------------------------------------------------------------------------


class ActivationProbe:
    """Mean, standard deviation, largest size and share of zeros of what each decoder block puts out.

    A block is watched for one forward pass after `start` and is otherwise as it was: hooks that stayed would be traced
    into its compiled code, and hooks that come later are not seen by code that is compiled already. So a compiled block
    is watched from outside, where `compile()` has put what is called instead of it.

    Args:
        model: the module inside DDP; its largest ModuleList holds the blocks.

    Raises:
        ValueError: it has no ModuleList.
    """

    NAMES = ("act_mean", "act_std", "act_absmax", "act_zero")

    def __init__(self, model: nn.Module):
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        if not lists:
            raise ValueError(f"{type(model).__name__} has no ModuleList of blocks to watch: pass --monitor light")
        self.blocks = list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters())))
        self.watched, self.seen = {}, {}

    def start(self) -> None:
        """Watch the next forward pass, that one alone."""
        self._stop()
        self.seen = {}
        for number, block in enumerate(self.blocks):
            if block._compiled_call_impl is None:
                hook = block.register_forward_hook(lambda _, __, out, number=number: self._see(number, out))
                self.watched[number] = hook.remove
            else:
                self._watch_compiled(number, block)

    def _watch_compiled(self, number: int, block: nn.Module) -> None:
        compiled = block._compiled_call_impl

        def call(*args, **kwargs):
            out = compiled(*args, **kwargs)
            self._see(number, out)
            return out

        block._compiled_call_impl = call
        self.watched[number] = lambda: setattr(block, "_compiled_call_impl", compiled)

    @torch.no_grad()
    def _see(self, number: int, out) -> None:
        self.watched.pop(number)()  # gradient checkpointing runs the block a second time
        values = (out[0] if isinstance(out, tuple) else out).detach()
        least, most = torch.aminmax(values)
        std, mean = torch.std_mean(values.float(), correction=0)
        zero = 1 - values.count_nonzero() / values.numel()
        self.seen[number] = torch.stack([mean, std, torch.maximum(-least, most).float(), zero])

    def _stop(self) -> None:
        for restore in self.watched.values():
            restore()
        self.watched = {}

    def collect(self) -> dict[str, torch.Tensor]:
        """{"act_mean/0": fp32 scalar, "act_std/0", "act_absmax/0", "act_zero/0", "act_mean/1", ...}; ends watching."""
        self._stop()
        seen, self.seen = self.seen, {}
        return {
            f"{name}/{number}": value
            for number in sorted(seen)
            for name, value in zip(self.NAMES, seen[number].unbind(), strict=True)
        }


# --- the machine ------------------------------------------------------------------------------------------------------


class Resources:
    """How busy the machine was since the last call."""

    def __init__(self):
        self.at, self.gpu_load_known = self._own_time(), True
        if psutil is not None:
            psutil.cpu_percent()  # the first one only starts the clock

    def __call__(self, device: str | torch.device) -> dict[str, float]:
        """{"cpu_load": share of all CPUs, 0 to 1, "memory_gb": of this process, "gpu_memory_gb": its peak, "gpu_load"}.

        What the system does not tell is left out.
        """
        device = torch.device(device)
        measured = {"cpu_load": self._cpu_load(), "memory_gb": process_memory()}
        if device.type == "cuda":
            measured["gpu_memory_gb"] = torch.cuda.max_memory_allocated(device)
            measured["gpu_load"] = self._gpu_load(device)
        elif device.type == "mps":
            measured["gpu_memory_gb"] = torch.mps.driver_allocated_memory()
        return {
            name: round(value / GB if name.endswith("_gb") else value, 4)
            for name, value in measured.items()
            if value is not None
        }

    @staticmethod
    def _own_time() -> tuple[float, float]:
        """(seconds on the wall, seconds of CPU of this process)."""
        times = os.times()
        return time.monotonic(), times.user + times.system

    def _cpu_load(self) -> float:
        if psutil is not None:
            return psutil.cpu_percent() / 100
        (wall, cpu), self.at = self.at, self._own_time()
        return min((self.at[1] - cpu) / max(self.at[0] - wall, 1e-9) / (os.cpu_count() or 1), 1.0)

    def _gpu_load(self, device: torch.device) -> float | None:
        if not self.gpu_load_known:
            return None
        try:
            return torch.cuda.utilization(device) / 100
        except Exception:  # no pynvml, no NVML in this container, a GPU that is cut in parts: each its own kind
            self.gpu_load_known = False
            return None


resources = Resources()


def process_memory() -> int | None:
    """Bytes of memory that this process holds; on macOS without psutil the most that it has held; None if unknown."""
    if psutil is not None:
        return psutil.Process().memory_info().rss
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "darwin":
        import resource  # (Windows has none)

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def hints(data_wait_share: float, gpu_load: float | None = None, text_share: float | None = None) -> list[str]:
    """What to change where time is lost: a line for each cause.

    Args:
        data_wait_share: share of the time in which a step waited for its batch.
        gpu_load: share of the time in which the GPU computed, where that is known.
        text_share: share of a batch's places that hold text and no padding, where that is known.
    """
    found = []
    if data_wait_share > LATE_DATA:
        found.append(
            f"the data is late: {data_wait_share:.0%} of the time was spent waiting for it: raise --num_workers"
        )
    elif gpu_load is not None and gpu_load < IDLE_GPU:
        found.append(f"the GPU computed only {gpu_load:.0%} of the time: raise --batch_size")
    if text_share is not None and text_share < EMPTY_BATCH:
        found.append(f"only {text_share:.0%} of a batch is text, the rest is padding: --packing 1 fills it")
    return found
