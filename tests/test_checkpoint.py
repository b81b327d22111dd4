"""Checkpoints: the old one or the new one at every moment, and never a third thing."""

import os
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from model import weights
from model.model_minimind import MiniMindForCausalLM
from model.weights import atomic_write, detect_config, load_state, save_tensors, sweep_temporaries
from trainer.checkpoint import Checkpoints, is_minimind, minimind_optimizer, read_state
from trainer.optimizer import parameter_groups


def state(number):
    generator = torch.Generator().manual_seed(number)
    return {
        "model": {"weight": torch.randn(200, 30, generator=generator)},
        "optimizer": {},
        "epoch": 0,
        "step": number,
        "world_size": 1,
        "rng": [],
    }


def written(folder, count, keep=2):
    files = Checkpoints(folder / "toy_32_resume.pth", keep)
    for number in range(1, count + 1):
        files.write(state(number))
    return files


def steps(folder):
    return {path.name: read_state(path)["step"] for path in sorted(folder.glob("*.pth"))}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_are_kept_in_order(tmp_path, keep):
    written(tmp_path, 5, keep)
    names = ["toy_32_resume.pth", "toy_32_resume.1.pth", "toy_32_resume.2.pth"]
    assert steps(tmp_path) == {names[i]: 5 - i for i in range(keep)}
    assert len(list(tmp_path.iterdir())) == keep


def test_fewer_are_kept_when_asked(tmp_path):
    written(tmp_path, 4, keep=4)
    Checkpoints(tmp_path / "toy_32_resume.pth", 2).write(state(9))
    assert steps(tmp_path) == {"toy_32_resume.pth": 9, "toy_32_resume.1.pth": 4}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("links", [True, False])  # a file system without hard links gets copies
def test_every_moment_leaves_the_old_or_the_new_one(tmp_path, monkeypatch, links):
    """The process dies at each call that changes the disk, one after the other."""
    calls = {"left": 0}

    def dying(function):
        def call(*args, **kwargs):
            calls["left"] -= 1
            if calls["left"] == 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    def refuse(*_):
        raise OSError("no hard links here")

    real = {name: getattr(os, name) for name in ("replace", "link", "unlink", "fsync", "chmod")}
    seen, moment = set(), 0
    while "new, alone" not in seen:
        moment += 1
        folder = tmp_path / str(moment)
        folder.mkdir()
        written(folder, 3)
        for name, function in real.items():
            monkeypatch.setattr(os, name, dying(function if links or name != "link" else refuse))
        calls["left"] = moment
        try:
            Checkpoints(folder / "toy_32_resume.pth", 2).write(state(4))
            seen.add("new, alone")
        except Killed:
            pass
        for name, function in real.items():
            monkeypatch.setattr(os, name, function)
        found, path = Checkpoints(folder / "toy_32_resume.pth", 2).read()
        assert path.name == "toy_32_resume.pth" and found["step"] in (3, 4)
        assert torch.equal(found["model"]["weight"], state(found["step"])["model"]["weight"])
        assert set(steps(folder).values()) <= {2, 3, 4} and max(steps(folder).values()) >= 3
        seen.add(found["step"])
    assert seen >= {3, 4} and moment > 5


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 0.9999])
def test_a_torn_file_is_named_and_the_one_before_it_used(tmp_path, share):
    files = written(tmp_path, 3)
    size = files.path.stat().st_size
    os.truncate(files.path, min(int(size * share), size - 1))
    said = []
    again = Checkpoints(files.path, 2, said.append)
    found, path = again.read()
    assert found["step"] == 2 and path == files.older(1)
    assert str(files.path) in said[0] and "toy_32_resume.1.pth" in said[1]
    again.write(state(4))
    assert steps(tmp_path) == {"toy_32_resume.pth": 4, "toy_32_resume.1.pth": 2}
    assert (tmp_path / "toy_32_resume.pth.unreadable").stat().st_size == min(int(size * share), size - 1)


def test_a_flipped_byte_is_noticed(tmp_path):
    """torch reads such a file without a word: the checksums are what tells."""
    files = written(tmp_path, 2)
    with zipfile.ZipFile(files.path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(files.path.read_bytes())
    content[largest.header_offset + 200 + random.Random(0).randrange(largest.file_size - 200)] ^= 1
    files.path.write_bytes(content)
    assert torch.load(files.path, weights_only=True)["step"] == 2
    with pytest.raises(ValueError, match="checksum"):
        read_state(files.path)
    assert Checkpoints(files.path).read()[0]["step"] == 1


def test_foreign_files_are_refused_by_name(tmp_path):
    path = tmp_path / "toy_32_resume.pth"
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=f"{path} is no checkpoint of a training run: it has no model"):
        read_state(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="torn or no checkpoint"):
        read_state(path)
    torch.save({"model": Killed, "optimizer": 0}, path)
    with pytest.raises(ValueError, match="Python objects"):
        read_state(path)
    with pytest.raises(ValueError, match="none of .*start anew with --from_resume 0"):
        Checkpoints(path, say=lambda text: None).read()
    assert Checkpoints(tmp_path / "other_resume.pth").read() is None


def test_a_failed_write_changes_nothing(tmp_path, monkeypatch):
    files = written(tmp_path, 3)
    before = steps(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "link"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            if name == "link":
                patch.setattr(shutil, "copyfile", full)
            with pytest.raises(OSError, match="No space left"):
                files.write(state(4))
        assert steps(tmp_path) == before and len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_an_oserror():
    """torch itself says `unexpected pos`, by a RuntimeError."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError, match="No space left"):
        save_tensors({"weight": torch.ones(100_000)}, "/dev/full")


def test_what_a_killed_write_left_is_swept(tmp_path):
    path = tmp_path / "a[1].pth"
    atomic_write(path, lambda temporary: open(temporary, "wb").close())
    for name in ("a[1].pth.x1_y.tmp", "a1.pth.zz.tmp", "b.pth.zz.tmp"):
        (tmp_path / name).touch()
    sweep_temporaries(path)
    assert {p.name for p in tmp_path.iterdir()} == {"a[1].pth", "a1.pth.zz.tmp", "b.pth.zz.tmp"}
    assert weights.glob.escape("a[") != "a["


def test_moments_of_minimind_find_their_parameters():
    """Two groups here, one there, in another order; the tied layer counts once."""
    model = torch.nn.Module()
    for name, shape in (("a", (3, 2)), ("norm", (2,)), ("b", (2, 2))):
        setattr(model, name, torch.nn.Parameter(torch.zeros(shape)))
    optimizer = torch.optim.AdamW([{"params": [model.b, model.a]}, {"params": [model.norm]}], betas=(0.9, 0.95))
    moments = {i: {"exp_avg": torch.full(shape, float(i))} for i, shape in enumerate([(3, 2), (2,), (2, 2)])}
    saved = {
        "model": {"a": 0, "norm": 0, "b": 0, "lm_head.weight": 0},
        "optimizer": {"state": moments, "param_groups": [{"params": [0, 1, 2], "betas": (0.9, 0.999), "eps": 1e-8}]},
    }
    found = minimind_optimizer(saved, model, optimizer)
    assert [found["state"][i]["exp_avg"].mean().item() for i in range(3)] == [2.0, 0.0, 1.0]
    assert all(group["betas"] == (0.9, 0.999) for group in found["param_groups"])
    moments[1]["exp_avg"] = torch.zeros(5)
    with pytest.raises(ValueError, match="no moments for norm"):
        minimind_optimizer(saved, model, optimizer)
    assert is_minimind(saved)


@pytest.mark.parametrize("generation", ["v2", "v3"])
def test_minimind_is_continued_as_it_would_go_on(generation):
    """The next step in our groups is that of AdamW over all parameters in one, in MiniMind's order, which differs."""
    if not os.environ.get("MINIMIND_FILES"):
        pytest.skip("MINIMIND_FILES does not name the folder with files that MiniMind wrote")
    path = Path(os.environ["MINIMIND_FILES"]) / generation / "full_sft_64_resume.pth"
    saved = read_state(path)
    assert is_minimind(saved)
    tensors = {name: tensor.float() for name, tensor in saved["model"].items()}
    models = []
    for ours in (False, True):
        saved = read_state(path)  # anew: an optimizer goes on in the tensors that it is given
        model = MiniMindForCausalLM(detect_config(tensors, say=lambda text: None))
        load_state(model, tensors, path)
        if ours:
            optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-2, fused=True)
            optimizer.load_state_dict(minimind_optimizer(saved, model, optimizer))
        else:
            parameters = dict(model.named_parameters())
            optimizer = torch.optim.AdamW([parameters[name] for name in tensors if name in parameters])
            optimizer.load_state_dict(saved["optimizer"])
        for group in optimizer.param_groups:
            group.update(lr=1e-2, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        for _, parameter in sorted(model.named_parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        models.append(model.state_dict())
    assert max((models[0][name] - models[1][name]).abs().max() for name in models[0]) < 1e-7
    assert any((models[0][name] - tensors[name]).abs().max() > 1e-3 for name in tensors)
