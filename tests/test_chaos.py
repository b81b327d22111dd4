"""scripts/chaos_train.py: what it measures by, that it sees a trainer which does not survive, and its short form."""

import json
import os
import random
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch

from conftest import run_script
from model.model_minimind import MiniMindConfig
from model.weights import save_weights
from scripts import chaos_train
from scripts.chaos_train import Chaos, Stage, Watched, updates_of

# A trainer without torch, with the lines, files and exit statuses of a real stage, and faults on demand. Its weights
# are `right` if every update was made once, in order.
TRAINER = """
import argparse, json, os, shutil, signal, sys, time, zipfile
parser = argparse.ArgumentParser()
for flag in ("save_dir", "checkpoint_dir", "max_steps", "from_resume"):
    parser.add_argument("--" + flag)
args, fault, samples, stop = parser.parse_known_args()[0], os.environ["FAULT"], os.environ["SAMPLES"], []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
os.makedirs(args.checkpoint_dir, exist_ok=True)
newest, older = (args.checkpoint_dir + f"/pretrain_64_resume{n}.pth" for n in ("", ".1"))

def write(path, content):
    with open(path, "wb") as file:
        file.write(content[:100])
        if fault == "torn":
            file.flush(), time.sleep(0.1)
        file.write(content[100:])

def save():
    content = open(samples + "/resume.pth", "rb").read() + json.dumps([step, x]).rjust(20).encode()
    try:
        if os.path.exists(newest):
            shutil.copyfile(newest, older + ".new")
            os.replace(older + ".new", older)
        write(newest if fault == "torn" else newest + ".new", content)
        if fault != "torn":
            os.replace(newest + ".new", newest)
    except OSError as error:
        if fault == "gives up":
            sys.exit(2)
        print(f"warning: could not be saved: {error}", flush=True)

step, x = 0, 0
if args.from_resume == "1":
    for path in filter(os.path.exists, (newest, older)):
        content = open(path, "rb").read()
        if content.endswith(b"]"):
            step, x = json.loads(content[-20:])
            break
        print(path if fault != "unnamed" else "a checkpoint", "is torn", flush=True)
        if fault == "from the start":
            break
    step += fault == "skips"
while step < int(args.max_steps):
    step += 1
    x += step
    time.sleep(0.02)
    print(f"Epoch:[1/1]({step}/{args.max_steps}) loss:1.0", flush=True)
    if step % (20 if fault == "loses" else 2) == 0 or stop:
        save()
    if stop:
        print("stopped" if fault == "silent" else "stopped: --from_resume 1 goes on", flush=True)
        sys.exit(143)
which = "right" if x == step * (step + 1) // 2 else "wrong"
for kind in (".pth", ".json"):
    shutil.copyfile(f"{samples}/{which}_64{kind}", f"{args.save_dir}/pretrain_64{kind}")
print(f"weights: {args.save_dir}", flush=True)
if fault == "ends slowly":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(1)
"""


@pytest.fixture
def chaos(tmp_path, monkeypatch):
    """chaos(fault) makes a Chaos over the trainer above."""
    samples = tmp_path / "samples"
    samples.mkdir()
    config = MiniMindConfig(hidden_size=64)
    for name, value in (("right", 1.0), ("wrong", 2.0)):
        save_weights(samples / f"{name}_64.pth", {"x": torch.full((1000,), value)}, config)
    state = {"model": {"x": torch.ones(10_000)}, "optimizer": {}, "epoch": 0, "step": 0, "world_size": 1}
    torch.save(state, samples / "resume.pth")
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER, encoding="utf-8")
    monkeypatch.setitem(chaos_train.STAGES, "pretrain", Stage(str(script), "pretrain", 1))
    monkeypatch.setenv("SAMPLES", str(samples))

    def make(fault="none"):
        monkeypatch.setenv("FAULT", fault)
        args = Namespace(out_dir=tmp_path / "chaos", steps=60)
        return Chaos(args, "pretrain", [], None, random.Random(1))

    return make


# --- a trainer that survives, and ones that do not --------------------------------------------------------------------


@pytest.mark.slow
def test_kills_and_stops_are_survived(chaos):
    tally = chaos().kills(8, 2)
    assert tally["problems"] == [] and (tally["kills"], tally["terms"]) == (8, 2)
    assert sum(tally["where"].values()) == 8 and tally["resumes"] == 10 and tally["rounds"] >= 2
    assert 0 < max(tally["lost"]) <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, kills, terms, problem",
    [
        ("skips", 6, 0, "pretrain_64.pth is"),
        ("loses", 6, 0, "updates lost, at most 2 may be"),
        ("torn", 12, 0, "is torn or no checkpoint"),
        ("silent", 0, 1, "SIGTERM gave exit status 143"),
    ],
)
def test_what_does_not_survive_is_seen(chaos, fault, kills, terms, problem):
    assert any(problem in text for text in chaos(fault).kills(kills, terms)["problems"])


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM")
@pytest.mark.parametrize("sent", [False, True])
def test_a_stop_signal_after_the_end_is_none(chaos, sent):
    """It is held back once the run has said that it is over; one that is sent in that moment is no fault of the run."""
    chaos = chaos("ends slowly")
    folder = chaos._fresh("late")
    with chaos._start(folder, False) as run:
        assert run.wait_for(lambda: run.is_over)
        if sent:
            run.process.terminate()
        assert chaos._interrupt(run, "term", made=60) is False
        assert chaos._finished(folder, run) == [] and run.was_too_late == sent


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, problem",
    [("none", None), ("unnamed", "was not named"), ("from the start", "before the torn one was not used")],
)
def test_torn_checkpoint(chaos, fault, problem):
    result = chaos(fault).torn()
    assert result["cut_at"] < result["of"]
    assert [problem in text for text in result["problems"]] == ([True] if problem else [])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits on another process's files are Linux's")
@pytest.mark.parametrize("how", ["tmpfs", "RLIMIT_FSIZE"])
@pytest.mark.parametrize("fault, survives", [("none", True), ("gives up", False)])
def test_full_disk(chaos, monkeypatch, how, fault, survives):
    if how == "tmpfs" and not chaos_train.may_mount():
        pytest.skip("needs root")
    monkeypatch.setattr(chaos_train, "may_mount", lambda: how == "tmpfs")
    result = chaos(fault).disk()
    if result.get("how") != how:
        pytest.skip("this machine lets even root mount nothing")
    assert (result["problems"] == []) == survives


# --- what it measures by ----------------------------------------------------------------------------------------------


def test_updates_are_counted_over_epochs():
    lines = ["device cpu", "Epoch:[1/3](7/8) loss:1", "validation: loss:2", "Epoch:[2/3](1/8) loss:1 ppl:2"]
    assert updates_of(lines) == [7, 9]


@pytest.mark.parametrize(
    "lines, wrote, where",
    [
        ([], False, "import"),
        (["device cpu, float32"], False, "data"),
        (["device cpu", "Epoch:[1/1](5/19) loss:1"], False, "step"),
        (["device cpu", "Epoch:[1/1](10/19) loss:1"], False, "validation"),
        (["device cpu", "Epoch:[1/1](10/19) loss:1", "validation: loss:1"], False, "validation"),
        (["device cpu", "Epoch:[1/1](4/19) loss:1"], True, "saving"),
        (["device cpu", "Epoch:[1/1](19/19) loss:1", "weights: a.pth"], False, "end"),
    ],
)
def test_phase(lines, wrote, where):
    assert chaos_train.phase(lines, wrote, steps=19) == where


def test_digest_is_of_names_and_bytes(tmp_path):
    def digest(content):
        torch.save(content, tmp_path / "a.pth")
        return chaos_train.digest(tmp_path / "a.pth")

    a, b = torch.arange(3.0), torch.arange(4.0)
    same = digest({"a": a, "b": b})
    assert same == digest({"b": b.clone(), "a": a})
    assert same != digest({"a": a, "c": b})
    assert same != digest({"a": a, "b": b.nextafter(torch.tensor(9.0))})


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    state = {"model": {}, "optimizer": {}, "epoch": 0, "step": 0, "world_size": 1}
    for name in ("a_64_resume.pth", "a_64_resume.1.pth"):
        torch.save(state, tmp_path / "checkpoints" / name)
    for name in ("a", "b"):
        save_weights(tmp_path / "out" / f"{name}_64.pth", {"x": torch.ones(9)}, MiniMindConfig(hidden_size=64))
    assert chaos_train.damaged(tmp_path) == []
    torn = tmp_path / "checkpoints/a_64_resume.1.pth"
    torn.write_bytes(torn.read_bytes()[:200])
    torch.save({"x": torch.zeros(9)}, tmp_path / "out/b_64.pth")
    problems = chaos_train.damaged(tmp_path)
    assert len(problems) == 2 and "a_64_resume.1.pth" in problems[0] and "b_64.json" in problems[1]


def test_a_report_says_what_was_left_out_and_what_differs():
    assert chaos_train.told({"left_out": "no root", "problems": []}) == ["left out: no root"]
    assert chaos_train.told({"how": "tmpfs", "problems": []})[-1].startswith("final weights equal")
    assert chaos_train.told({"how": "tmpfs", "problems": ["a differs"]}) == ["how tmpfs", "a differs"]


def test_shares_add_up():
    assert [chaos_train.share(31, 2, i) for i in range(2)] == [15, 16]
    assert [chaos_train.share(5, 3, i) for i in range(3)] == [1, 2, 2]


def test_a_watched_process_ends_with_its_children(tmp_path):
    """Those that it has started, too: they would hold the machine, and the files, of the next round."""
    child = "import time; print('child', flush=True); time.sleep(60)"
    code = (
        f"import os, subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid); p.wait()"
    )
    with Watched([sys.executable, "-c", code]) as run:
        assert run.wait_for(lambda: len(run.lines) == 2)
        pid = next(int(line) for line in run.lines if line.isdigit())
    assert run.process.returncode != 0
    if os.name != "nt":
        until = time.monotonic() + 10
        while is_alive(pid) and time.monotonic() < until:
            time.sleep(0.05)
        assert not is_alive(pid)


def is_alive(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_a_silent_process_is_given_up(monkeypatch):
    monkeypatch.setattr(chaos_train, "PATIENCE", 0.3)
    with pytest.raises(ValueError, match="nothing happened for 0 s after"):
        with Watched([sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"]) as run:
            run.end()
    assert run.process.returncode != 0


@pytest.mark.long
def test_short_form(tmp_path):
    done = run_script("scripts/chaos_train.py", "--short", "--out_dir", tmp_path / "chaos", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "chaos/report.json").read_text(encoding="utf-8"))
    kills = report["stages"]["pretrain"]["kills"]
    assert report["problems"] == [] and (kills["kills"], kills["terms"]) == (3, 1)
    assert report["stages"]["pretrain"]["torn"]["resumed_at"] > 1
    assert len(report["stages"]["pretrain"]["undisturbed"]["digests"]) == 2  # the last weights and the best


def test_only_its_own_folder_is_emptied(tmp_path):
    folder = tmp_path / "mine"
    chaos_train.empty(folder)
    (folder / "report.json").touch()
    chaos_train.empty(folder)
    assert [path.name for path in folder.iterdir()] == [chaos_train.MARK]
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="holds other files, which would be deleted"):
        chaos_train.empty(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
