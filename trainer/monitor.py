"""What a run tells: a progress bar, a line in the terminal, a line in the metrics file, and wandb where asked for."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm


class Monitor:
    """The voice of the main process; on every other one each method does nothing.

    Args:
        path: the metrics file; a resumed run goes on in it, a fresh one begins it anew.
        total: updates in the whole run; done: updates made before a resume.
        wandb: a wandb run or None.
    """

    def __init__(self, path: str | Path, total: int, done: int = 0, active: bool = True, wandb=None):
        self.active, self.wandb, self.total, self.done = active, wandb, total, done
        self.began, self.first = time.monotonic(), done
        if not active:
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _lines_until(path, done) if done else []
        path.write_text("".join(kept), encoding="utf-8", newline="\n")
        self.file = path.open("a", encoding="utf-8", newline="\n")
        # a file or a pipe gets the log lines only: a bar would fill it with carriage returns
        self.bar = tqdm(total=total, initial=done, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def advance(self) -> None:
        """Count one update."""
        self.done += 1
        if self.active:
            self.bar.update()

    def minutes_left(self) -> float:
        return (time.monotonic() - self.began) / max(self.done - self.first, 1) * (self.total - self.done) / 60

    def record(self, line: str | None = None, **metrics) -> None:
        """Write one entry to the metrics file and wandb; print `line` if there is one."""
        if not self.active:
            return
        entry = {"update": self.done, "seconds": round(time.monotonic() - self.began, 3), **metrics}
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        if self.wandb is not None:
            self.wandb.log(metrics, step=self.done)
        if line:
            tqdm.write(line)

    def close(self) -> None:
        if not self.active:
            return
        self.bar.close()
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


def _lines_until(path: Path, update: int) -> list[str]:
    """The lines of a metrics file up to an update; what came after it, its validation too, is done again."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # torn by a crash
            break
        if entry["update"] < update or (entry["update"] == update and "val_loss" not in entry):
            kept.append(line)
    return kept


def start_wandb(args, wandb_id: str | None):
    """A wandb run, online only where a key is set: without one wandb would stop the run, without a network stall it."""
    import wandb

    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    name = f"{args.save_weight}-bs{args.batch_size}-lr{args.learning_rate:g}"
    return wandb.init(
        project=args.wandb_project,
        name=name,
        config=config,
        id=wandb_id,
        resume="allow" if wandb_id else None,
        mode=mode,
        dir=str(args.checkpoint_dir),
    )
