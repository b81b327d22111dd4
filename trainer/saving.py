"""When a run is saved, what is written then, and what happens when that fails: training goes on."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from model.weights import save_weights, sweep_temporaries, tokenizer_digest, update_sidecar, weight_path
from trainer.checkpoint import Checkpoints, resume_path
from trainer.resume import plain
from trainer.trainer_utils import Logger

# a save may take this share of the time between two of them, whatever --save_minutes says
SAVE_SHARE = 0.025
# how long the last save of a run is tried again where the disk is full, in seconds
PATIENCE, RETRY = 120.0, 5.0


class Saver:
    """Writes weights and checkpoints. For the main process alone, but for reading.

    Args:
        args, lm_config: name the files. tokenizer: goes into the sidecar of the weights, by digest, or None.
        data: counts, for the sidecar.

    Attributes:
        saved_update: the update that is on the disk, to resume from; None before the first save of a fresh run.
    """

    def __init__(self, args, lm_config, tokenizer, data: dict):
        self.args, self.lm_config, self.tokenizer, self.data = args, lm_config, tokenizer, data
        path = resume_path(lm_config, args.save_weight, args.checkpoint_dir)
        self.checkpoints = Checkpoints(path, args.keep_checkpoints, Logger)
        self.saved_update: int | None = None
        self.resumed = False
        self._written: set[str] = set()
        self._wait(0.0)

    def _wait(self, seconds: float) -> None:
        self._next = time.monotonic() + max(self.args.save_minutes * 60, seconds / SAVE_SHARE)

    def path(self, name: str):
        return weight_path(self.args.save_dir, name, self.lm_config)

    @property
    def best_name(self) -> str:
        return f"{self.args.save_weight}_best"

    def prepare(self) -> None:
        """Before the first step: see that the folders can be written, and clear away what a killed run left half done.

        Raises:
            OSError: a folder cannot be written; better said now than after hours.
        """
        for folder in (self.args.save_dir, self.args.checkpoint_dir):
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise OSError(f"nothing can be saved in {folder}: {error}. Name another folder") from error
        for path in (self.checkpoints.path, self.path(self.args.save_weight), self.path(self.best_name)):
            sweep_temporaries(path)

    def is_due(self, step: int) -> bool:
        """By --save_interval where it is given, else by --save_minutes, or later if saving takes long."""
        if self.args.save_interval > 0:
            return step % self.args.save_interval == 0
        return time.monotonic() >= self._next

    def tried(self, seconds: float) -> None:
        """Note how long a save took, whether it worked or not: the next one is so much later."""
        self._wait(seconds)

    def attempt(self, save, update: int, event, last: bool = False) -> bool:
        """Call `save()`; returns whether it worked. If not, what was saved before is still there, and `event` is told.

        Args:
            last: no other save will follow, so it is tried again for two minutes.
        """
        until = time.monotonic() + PATIENCE * last
        while True:
            try:
                save()
                return True
            except OSError as error:
                kept = f"update {self.saved_update:,} is" if self.saved_update else "nothing is yet"
                again = time.monotonic() < until
                then = f"trying again in {RETRY:.0f} s: free some space" if again else "training goes on"
                event(f"update {update:,} could not be saved ({error}); {kept} on the disk; {then}", "failed_save")
                if not again:
                    return False
                time.sleep(RETRY)

    def weights(self, name: str, state_dict: dict, update: int, metrics: dict) -> None:
        """Write weights and sidecar; those of an earlier run are kept once, as `.prev`. Raises OSError."""
        args = self.args
        tokenizer = {}
        if self.tokenizer is not None:
            tokenizer = {"path": str(args.tokenizer_path), "digest": tokenizer_digest(self.tokenizer)}
        save_weights(
            self.path(name),
            state_dict,
            self.lm_config,
            args.save_dtype,
            keep_previous=not self.resumed and name not in self._written,
            stage=args.stage,
            tokenizer=tokenizer,
            data={"path": plain(args)["data_path"], **self.data},
            arguments=plain(args),
            update=update,
            metrics=metrics,
        )
        self._written.add(name)

    def finish(self, export, update: int, metrics: dict) -> None:
        """Leave the weights with the last metrics in their sidecar."""
        if self.args.save_weight in self._written:
            update_sidecar(self.path(self.args.save_weight), metrics=metrics)
        else:  # a run that was resumed after its end
            self.weights(self.args.save_weight, export(), update, metrics)
