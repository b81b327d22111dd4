"""The files that a run is resumed from: written whole or not at all, the last few kept, and checked when read.

    checkpoints/pretrain_512_resume.pth        the newest
    checkpoints/pretrain_512_resume.1.pth      the one before it, as many as --keep_checkpoints says

A file that is torn or of something else is named, and the one before it is used.
"""

from __future__ import annotations

import glob
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import torch

from model.weights import atomic_write, save_tensors

# what a file must hold to be continued; MiniMind's files hold these and little more
REQUIRED = ("model", "optimizer", "epoch", "step", "world_size")


def resume_path(lm_config, weight: str, save_dir: str | Path) -> Path:
    return Path(save_dir) / f"{weight}_{lm_config.hidden_size}{'_moe' if lm_config.use_moe else ''}_resume.pth"


class Checkpoints:
    """The newest checkpoint at `path` and the ones before it.

    Args:
        path: what resume_path gives. keep: how many files there are at most. say: told what could not be read.
    """

    def __init__(self, path: str | Path, keep: int = 2, say=print):
        self.path, self.keep, self.say = Path(path), keep, say
        self._unreadable: list[Path] = []

    def older(self, number: int) -> Path:
        """The place of the checkpoint that was the newest `number` saves ago."""
        return self.path.with_name(f"{self.path.stem}.{number}.pth") if number else self.path

    def found(self) -> list[Path]:
        """The files that are there, the newest first, those of a run that kept more among them."""
        others = self.path.parent.glob(f"{glob.escape(self.path.stem)}.*.pth")
        numbers = [path.stem.rsplit(".", 1)[-1] for path in others]
        older = sorted(int(number) for number in numbers if number.isdigit() and int(number) > 0)
        return [path for path in map(self.older, [0, *older]) if path.exists()]

    def read(self) -> tuple[dict, Path] | None:
        """(state on the CPU, its file) of the newest checkpoint that can be read; None where there is no file.

        Raises:
            ValueError: there are files, and none of them can be read.
        """
        files = self.found()
        for path in files:
            try:
                state = read_state(path)
            except ValueError as error:
                self._unreadable.append(path)
                self.say(f"{error}; it is set aside as {_aside(path).name} at the next save")
                continue
            if self._unreadable:
                self.say(f"continuing from the checkpoint before it, {path}")
            return state, path
        if files:
            raise ValueError(
                f"none of {', '.join(map(str, files))} can be continued: start anew with --from_resume 0, or put a "
                "whole checkpoint there"
            )
        return None

    def set_aside(self) -> None:
        """A fresh run begins: what an earlier one of this name left is kept once, as `.prev`, and not resumed by it."""
        newest, *older = self.found() or [None]
        if newest is not None:
            previous = self.path.with_name(f"{self.path.stem}.prev.pth")
            os.replace(newest, previous)
            self.say(f"the checkpoint of an earlier run of this name is now {previous}")
        for path in older:
            path.unlink()

    def write(self, state: dict) -> None:
        """Make `state` the newest checkpoint. Raises OSError, and then everything is as it was."""
        atomic_write(self.path, lambda temporary: self._write(state, temporary))
        for path in self.found()[self.keep :]:
            path.unlink()

    def _write(self, state: dict, temporary: str) -> None:
        """First the new file, whole, beside the others; then each of those moves one place, the oldest first."""
        save_tensors(state, temporary)
        for path in self._unreadable:
            if path.exists():
                os.replace(path, _aside(path))
        self._unreadable = []
        for number in reversed(range(1, self.keep)):
            if self.older(number - 1).exists():
                # the newest stays in its own place, too, until the new one takes it: there is always one
                (_link if number == 1 else os.replace)(self.older(number - 1), self.older(number))


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".unreadable")


def _link(path: Path, other: Path) -> None:
    """A second name for a file, in place of what had that name; a copy where the file system has no such thing."""

    def link(temporary):
        os.unlink(temporary)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)

    atomic_write(other, link)


def read_state(path: Path) -> dict:
    """The content of a checkpoint, checked against the checksums that torch wrote into it.

    Raises:
        ValueError: torn, another format, or no checkpoint; says which.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is torn or no checkpoint: {error}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds Python objects, which are never loaded") from error
    except (RuntimeError, EOFError, KeyError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if damaged:
        raise ValueError(f"{path} is damaged: the checksum of {damaged} is wrong")
    missing = [name for name in REQUIRED if not isinstance(state, dict) or name not in state]
    if missing:
        raise ValueError(f"{path} is no checkpoint of a training run: it has no {', '.join(missing)}")
    return state


# --- MiniMind's own files ---------------------------------------------------------------------------------------------


def is_minimind(state: dict) -> bool:
    """Written by MiniMind: no random state, no arguments, the model in half precision."""
    return "rng" not in state


def minimind_optimizer(state: dict, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The AdamW moments of a MiniMind file, put into the order of the groups of `optimizer`.

    MiniMind numbers its parameters in the order of the model, all in one group; here there is a group that is decayed
    and one that is not.

    Raises:
        ValueError: the file has other parameters than the model, or the optimizer is not AdamW.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        raise ValueError("MiniMind's checkpoints hold AdamW's state: pass --optimizer adamw")
    theirs, saved = state["optimizer"]["state"], state["optimizer"]["param_groups"]
    numbers = [number for group in saved for number in group["params"]]
    # a tied output layer is the embedding once more, and not a parameter of its own
    tied = len(state["model"]) - len(numbers)
    names = [name for name in state["model"] if not (tied and name == "lm_head.weight")]
    if len(names) != len(numbers):
        raise ValueError(f"MiniMind's checkpoint has {len(names)} weights, but an optimizer over {len(numbers)}")
    number_of = dict(zip(names, numbers, strict=True))
    ours = {id(p): name for name, p in model.named_parameters()}
    content, moments = optimizer.state_dict(), {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        number = number_of.get(ours[id(parameter)])
        if number is None or theirs[number]["exp_avg"].shape != parameter.shape:
            raise ValueError(f"MiniMind's checkpoint has no moments for {ours[id(parameter)]} {tuple(parameter.shape)}")
        moments[index] = theirs[number]
    groups = [group | {"betas": saved[0]["betas"], "eps": saved[0]["eps"]} for group in content["param_groups"]]
    return {"state": moments, "param_groups": groups}
