"""What a run tells: a progress bar, a line in the terminal, a line in metrics.jsonl, TensorBoard, wandb or swanlab.

Telling never ends a run: a full disk, a terminal that is gone, a tracker that fails is said once, and training goes on.

    tail -f out/runs/pretrain_512-20260131-181502/metrics.jsonl
    tensorboard --logdir out/runs
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from model.weights import atomic_write

TENSORBOARD_TAGS = {
    "loss": "Training/Loss",
    "ppl": "Training/Perplexity",
    "aux_loss": "Training/BalanceLoss",
    "lr": "Training/LearningRate",
    "grad_norm": "Training/GradientNorm",
    "param_norm": "Training/ParameterNorm",
    "update_ratio": "Training/WeightUpdateRatio",
    "tokens_per_second": "Performance/TokensPerSecond",
    "data_wait": "Performance/DataWait",
    "gpu_memory_gb": "Performance/GPUMemoryGB",
    "gpu_load": "Performance/GPULoad",
    "memory_gb": "Performance/MemoryGB",
    "cpu_load": "Performance/CPULoad",
    "val_loss": "Validation/Loss",
    "val_ppl": "Validation/Perplexity",
    "val_bits_per_byte": "Validation/BitsPerByte",
    "regression_pass_rate": "Regression/PassRate",
    "regression_passed": "Regression/Passed",
}
# where the run is, and no measurement: TensorBoard has its own x axis
NOT_IN_TENSORBOARD = {"epoch", "step", "tokens", "eta_minutes"}


class Monitor:
    """The voice of the main process; on every other one each method does nothing.

    Args:
        folder: the run directory; None where not active.
        total: updates in the whole run; done: updates made before a resume.
        tracker: what `start_tracker` gives, or None; `tensorboard`: events too, where it is installed.

    Raises:
        OSError: the metrics file cannot be read or written at the start.
    """

    def __init__(
        self,
        folder: Path | None,
        total: int,
        done: int = 0,
        active: bool = True,
        tracker=None,
        tensorboard: bool = True,
    ):
        self.active, self.total, self.done, self.first = active, total, done, done
        self.began = self.resumed_at = time.monotonic()
        if not active:
            return
        # a file or a pipe gets the log lines only: a bar would fill it with carriage returns
        self.bar = tqdm(total=total, initial=done, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.file = MetricsFile(Path(folder) / "metrics.jsonl", done)
        self.began -= self.file.seconds  # curves over seconds go on where they were
        board = open_tensorboard(folder, done) if tensorboard and importlib.util.find_spec("tensorboard") else None
        self.followers = [follower for follower in (tracker, board) if follower is not None]

    def advance(self) -> None:
        """Count one update."""
        self.done += 1
        if self.active:
            self.bar.update()  # (tqdm itself ends a bar whose terminal is gone)

    def minutes_left(self) -> float:
        return (time.monotonic() - self.resumed_at) / max(self.done - self.first, 1) * (self.total - self.done) / 60

    def record(self, line: str | None = None, **metrics) -> None:
        """Write one entry to the metrics file, TensorBoard and the tracker; print `line` if there is one.

        Numbers may be 0-dimensional tensors, which are waited for; what is not finite becomes null.
        """
        if not self.active:
            return
        metrics = plain(metrics)
        self._write(metrics)
        numbers = {name: value for name, value in metrics.items() if type(value) in (int, float)}
        for follower in list(self.followers):
            self._try(follower, lambda follower=follower: follower.log(numbers, step=self.done))
        if line:
            say(line)

    def event(self, line: str | None, kind: str, **facts) -> None:
        """Print `line`, and write an entry {"event": kind, ...} to the metrics file: what happened, no measurement."""
        if not self.active:
            return
        self._write({"event": kind, **plain(facts)})
        if line:
            say(line)

    def _write(self, entry: dict) -> None:
        seconds = round(time.monotonic() - self.began, 3)
        self.file.append({"update": self.done, "seconds": seconds, **entry})

    def _try(self, follower, action) -> None:
        """Do something with TensorBoard or the tracker; one that fails is said, and left alone from then on."""
        try:
            action()
        except Exception as error:  # each of them raises kinds of its own, without a common base
            self.followers.remove(follower)
            name = type(follower).__module__.split(".")[0] if not isinstance(follower, Board) else "tensorboard"
            reason = f"{type(error).__name__}: {error}"
            self.event(f"{name} gets no more entries ({reason}); metrics.jsonl does", "tracker_lost", reason=reason)

    def close(self) -> None:
        if not self.active:
            return
        self.bar.close()
        for follower in list(self.followers):
            self._try(follower, follower.finish)


def say(line: str) -> None:
    """Print above the progress bar, at once even where a file reads it; a terminal that is gone ends no run."""
    try:
        tqdm.write(line)
        sys.stdout.flush()
    except OSError:
        # the log lies on a full disk, or its reader has gone: there is nobody left to tell, the run directory knows all
        return


def plain(value):
    """Facts as JSON holds them: tensors as numbers, numbers that are not finite as None, paths as strings."""
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


# --- the metrics file -------------------------------------------------------------------------------------------------


class MetricsFile:
    """JSON lines, each of them whole; what cannot be written now is kept and written with the next one.

    The file is opened for each entry (some 50 microseconds), so that a folder that comes back is found again.

    Attributes:
        seconds: those of the last entry that was there at the start, else 0.
    """

    def __init__(self, path: Path, done: int = 0):
        self.path, self.waiting, self.torn_at, self.said = path, b"", None, False
        kept = entries_until(path, done)
        self.seconds = kept[-1].get("seconds", 0.0) if kept else 0.0
        content = b"".join(encode(entry) for entry in kept)
        atomic_write(path, lambda temporary: Path(temporary).write_bytes(content))

    def append(self, entry: dict) -> None:
        self.waiting += encode(entry)
        end = None
        try:
            with open(self.path, "ab") as file:
                if self.torn_at is not None:
                    file.truncate(min(self.torn_at, file.tell()))
                    self.torn_at = None
                end = os.fstat(file.fileno()).st_size
                file.write(self.waiting)
            self.waiting = b""
        except OSError as error:
            self.torn_at = end if end is not None else self.torn_at
            if not self.said:
                self.said = True
                say(f"warning: {self.path} cannot be written now, training goes on: {error}")


def encode(entry: dict) -> bytes:
    # a lone half of a surrogate pair becomes its JSON escape
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")


def entries_until(path: Path, update: int) -> list[dict]:
    """The entries of a metrics file up to an update, the later ones are made again; lines torn by a crash go."""
    kept = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        at = entry.get("update") if isinstance(entry, dict) else None
        if isinstance(at, int) and at <= update:
            kept.append(entry)
    return kept


# --- TensorBoard and trackers -----------------------------------------------------------------------------------------


class Board:
    """TensorBoard events, with the manners of a tracker."""

    def __init__(self, writer):
        self.writer = writer

    def log(self, metrics: dict, step: int) -> None:
        for name, value in metrics.items():
            if name not in NOT_IN_TENSORBOARD:
                group = "Activations" if name.startswith("act_") else "Extra"
                self.writer.add_scalar(TENSORBOARD_TAGS.get(name, f"{group}/{name}"), value, step)

    def finish(self) -> None:
        self.writer.close()


def open_tensorboard(folder: str | Path, done: int = 0) -> Board | None:
    """Events in that folder, or None, said, where the tensorboard that is installed does not work."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        # what an earlier process wrote after its last checkpoint is hidden, as it is done again
        return Board(SummaryWriter(str(folder), purge_step=done + 1 if done else None, flush_secs=30))
    except Exception as error:  # protobuf, numpy and the disk have each their own way to fail here
        say(f"no TensorBoard events: {type(error).__name__}: {error}")
        return None


def start_tracker(args, tracker_id: str | None, folder: str | Path):
    """A run of wandb or swanlab, whichever args.use_wandb names; the same run again where its id is given.

    Offline unless a key or the tracker's own variable says otherwise: without a key both would stop and ask, without a
    network stall.

    Returns:
        an object with `id`, `log(dict, step=)` and `finish()`.

    Raises:
        ValueError: the package is not installed.
    """
    name = args.use_wandb
    try:
        module = importlib.import_module(name)
    except ImportError:
        module = None
    # (a folder `wandb` of earlier runs, in the working directory, imports as an empty package)
    if module is None or not callable(getattr(module, "init", None)):
        raise ValueError(f"--use_wandb {name} needs a package that is not installed: pip install {name}")
    return {"wandb": _start_wandb, "swanlab": _start_swanlab}[name](
        module,
        project=args.wandb_project,
        name=Path(folder).name,
        config=plain(vars(args)),
        id=tracker_id,
        resume="allow" if tracker_id else None,
        folder=str(folder),
    )


def _start_wandb(wandb, folder: str, **how):
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    if not os.environ.get("WANDB_MODE"):
        os.environ.pop("WANDB_MODE", None)  # wandb refuses an empty one, whatever mode is passed
    return wandb.init(dir=folder, mode=mode, **how)


def _start_swanlab(swanlab, folder: str, **how):
    mode = os.environ.get("SWANLAB_MODE") or ("online" if os.environ.get("SWANLAB_API_KEY") else "offline")
    return swanlab.init(log_dir=str(Path(folder) / "swanlog"), mode=mode, **how)
