"""The record of a run: its folder, its metrics file under all that can happen to it, the trackers, the probes."""

import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import ROOT
from trainer import monitor as monitor_module
from trainer import probes, record
from trainer.monitor import Monitor, start_tracker


def entries(folder):
    """Each line must be JSON by itself, with no NaN in it."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.split("\n")[:-1]]


def a_monitor(folder, **how):
    folder.mkdir(exist_ok=True)
    return Monitor(folder, **{"total": 10, "tensorboard": False, **how})


# --- the folder -------------------------------------------------------------------------------------------------------


def test_runs_that_start_together_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(record.time, "strftime", lambda _: "20260131-181502")
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: record.open_folder(tmp_path / "runs", "toy_32"), range(16)))
    names = sorted(folder.name for folder in folders)
    wanted = ["toy_32-20260131-181502", *(f"toy_32-20260131-181502-{number}" for number in range(2, 17))]
    assert names == sorted(wanted) and all(folder.is_dir() for folder in folders)


def test_a_resumed_run_goes_on_in_its_folder(tmp_path):
    first = record.open_folder(tmp_path, "toy")
    assert record.open_folder(tmp_path, "toy", first.name) == first
    gone = record.open_folder(tmp_path, "toy", "toy-20200101-000000")
    assert gone.parent == tmp_path and gone not in (first, tmp_path / "toy-20200101-000000")
    (tmp_path / "runs").mkdir()
    for outside in ("..", ".", f"../{first.name}", str(first)):  # what a checkpoint says is not believed
        assert record.open_folder(tmp_path / "runs", "toy", outside).resolve().parent == tmp_path / "runs"


def test_each_resume_leaves_its_own_config(tmp_path):
    paths = [record.write_config(tmp_path, {"from_resume": number, "name": "模型"}) for number in range(3)]
    assert [path.name for path in paths] == ["config.json", "config-2.json", "config-3.json"]
    assert [json.loads(path.read_text(encoding="utf-8"))["from_resume"] for path in paths] == [0, 1, 2]
    record.write_summary(tmp_path, {"loss": 3})
    assert json.loads(record.write_summary(tmp_path, {"loss": 2}).read_text(encoding="utf-8")) == {"loss": 2}
    assert len(list(tmp_path.iterdir())) == 4  # and nothing temporary


def git(folder, *command):
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, *command], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
def test_code_version_sees_commit_and_changes(tmp_path):
    for name, text in (("trainer/a.py", "a = 1\n"), ("model/b.py", "b = 1\n"), ("README.md", "x\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert record.code_version(tmp_path) | {"digest": ""} == {"commit": None, "changed": None, "digest": ""}
    git(tmp_path, "init", "--quiet")
    assert record.code_version(tmp_path)["commit"] is None  # no commit yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    clean = record.code_version(tmp_path)
    assert clean["commit"] == git(tmp_path, "rev-parse", "HEAD") and clean["changed"] is False
    content = b"".join(f"{name}\0{6}\0".encode() + text for name, text in (("model/b.py", b"b = 1\n"),))
    content += b"trainer/a.py\x006\x00a = 1\n"
    assert clean["digest"] == hashlib.sha256(content).hexdigest()

    (tmp_path / "new.txt").write_bytes(b"not tracked")
    (tmp_path / "trainer/a.py").write_bytes(b"a = 1\r\n")  # a checkout on Windows
    assert record.code_version(tmp_path)["digest"] == clean["digest"]
    (tmp_path / "trainer/a.py").write_bytes(b"a = 1\n")
    assert record.code_version(tmp_path) == clean
    (tmp_path / "README.md").write_bytes(b"y\n")
    assert record.code_version(tmp_path) == clean | {"changed": True}
    assert record.code_version(tmp_path / "trainer")["commit"] is None  # a copy inside something else
    (tmp_path / "trainer/a.py").write_bytes(b"a = 2\n")
    assert record.code_version(tmp_path)["digest"] != clean["digest"]


def test_code_version_without_git(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()  # and nothing in it
    version = record.code_version(tmp_path)
    assert version["commit"] is version["changed"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    version = record.code_version(ROOT)
    assert version["commit"] is version["changed"] is None and len(version["digest"]) == 64


def test_a_git_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()

    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(record.subprocess, "run", hang)
    assert record.code_version(tmp_path)["commit"] is None


def test_environment_says_what_ours_is_and_nothing_secret(monkeypatch):
    monkeypatch.setenv("MINIGPT_TRAIN_SEED", "7")
    monkeypatch.setenv("MINIGPT_API_KEY", "do-not-tell")
    monkeypatch.setenv("PRIVATE", "do-not-tell")
    monkeypatch.setattr(sys, "argv", ["trainer/train_pretrain.py", "--epochs", "2"])
    seen = record.environment()
    assert seen["variables"]["MINIGPT_TRAIN_SEED"] == "7" and "do-not-tell" not in json.dumps(seen)
    assert seen["command"][1:] == ["trainer/train_pretrain.py", "--epochs", "2"]
    assert seen["versions"]["torch"] == torch.__version__ and seen["cpu"]["count"] == os.cpu_count()
    assert seen["cpu"]["model"] and len(seen["gpus"]) == torch.cuda.device_count()


# --- the metrics file -------------------------------------------------------------------------------------------------


def test_a_resumed_run_has_each_update_once(tmp_path):
    cut = a_monitor(tmp_path)
    for update in range(1, 8):
        cut.advance()
        cut.record(loss=10.0 - update)
        if update in (4, 6):
            cut.record(val_loss=9.0, epoch=1)
    cut.event(None, "spike", loss=99.0)
    cut.close()  # the last checkpoint is that of update 4

    resumed = a_monitor(tmp_path, done=4)
    resumed.event("resumed", "resume")
    for update in range(5, 8):
        resumed.advance()
        resumed.record(loss=10.0 - update)
    resumed.close()
    seen = entries(tmp_path)
    assert [entry["update"] for entry in seen if "loss" in entry] == [1, 2, 3, 4, 5, 6, 7]
    assert [entry["update"] for entry in seen if "val_loss" in entry] == [4]
    assert [entry["event"] for entry in seen if "event" in entry] == ["resume"]


def test_seconds_go_on_after_a_resume(tmp_path):
    lines = [{"update": 3, "seconds": 100.0, "loss": 1.0}, {"update": 5, "seconds": 900.0, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    resumed = a_monitor(tmp_path, done=4)
    resumed.record(loss=1.0)
    assert 100 <= entries(tmp_path)[-1]["seconds"] < 110


def test_minutes_left_count_from_the_resume(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"update": 3, "seconds": 5000.0}\n', encoding="utf-8")
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(monitor_module.time, "monotonic", lambda: clock.now)
    resumed = a_monitor(tmp_path, total=13, done=3)
    clock.now += 120.0
    resumed.advance(), resumed.advance()
    assert resumed.minutes_left() == pytest.approx(8)  # 2 in 2 minutes, 8 are left


@pytest.mark.parametrize(
    "torn", [b'{"update": 2, "sec', b"\x00\x00\x00", b'"update"\n', b'{"update": 2, "loss": \xff}\n']
)
def test_a_line_torn_by_a_crash_is_cut_away(tmp_path, torn):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"update": 1, "seconds": 1.0, "loss": 3.0}\n' + torn)
    resumed = a_monitor(tmp_path, done=2)
    resumed.record(loss=2.0)
    assert [entry["loss"] for entry in entries(tmp_path)] == [3.0, 2.0]


def test_any_value_gives_valid_json(tmp_path):
    watched = a_monitor(tmp_path)
    watched.record(loss=math.nan, grad_norm=torch.tensor(math.inf), lr=torch.tensor(0.5), tokens=torch.tensor(3))
    watched.event(None, "bad_update", rows=[{"file": tmp_path, "text": "坏\u2028行 \udc80", "loss": math.nan}])
    number, event = entries(tmp_path)
    assert (number["loss"], number["grad_norm"], number["lr"], number["tokens"]) == (None, None, 0.5, 3)
    assert event["rows"] == [{"file": str(tmp_path), "text": "坏\u2028行 \udc80", "loss": None}]


def test_a_full_disk_is_said_once_and_loses_nothing(tmp_path, capsys):
    """A real one: the file may not grow past a limit, so that a line is written in part."""
    resource = pytest.importorskip("resource")
    watched = a_monitor(tmp_path)
    watched.record(loss=0.0)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 20, hard))
    try:
        watched.record(loss=1.0)
        watched.record(loss=2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert not (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")  # torn
    said = capsys.readouterr().out
    assert said.count("cannot be written now, training goes on") == 1 and "too large" in said.lower()
    watched.record(loss=3.0)
    watched.record(loss=4.0)
    assert [entry["loss"] for entry in entries(tmp_path)] == [0, 1, 2, 3, 4]


def test_a_folder_that_goes_and_comes_back(tmp_path, capsys):
    watched = a_monitor(tmp_path / "run")
    watched.record(loss=0.0)
    os.rename(tmp_path / "run", tmp_path / "away")
    watched.record(loss=1.0)
    assert "training goes on" in capsys.readouterr().out
    os.rename(tmp_path / "away", tmp_path / "run")
    watched.record(loss=2.0)
    watched.close()
    assert [entry["loss"] for entry in entries(tmp_path / "run")] == [0, 1, 2]


def test_other_processes_say_and_write_nothing(tmp_path, capsys):
    quiet = Monitor(None, total=10, active=False)
    quiet.advance()
    quiet.record("a line", loss=1.0)
    quiet.event("a line", "resume")
    quiet.close()
    assert quiet.done == 1 and not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


# --- the terminal -----------------------------------------------------------------------------------------------------


def terminal(monkeypatch):
    """The other end of a terminal that stdout and stderr are from now on; those are returned, too."""
    pty, fcntl, termios = map(pytest.importorskip, ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    file = open(theirs, "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(sys, "stderr", file)
    return ours, file


def test_a_terminal_has_a_bar_and_the_lines(tmp_path, monkeypatch):
    ours, file = terminal(monkeypatch)
    watched = a_monitor(tmp_path)
    watched.bar.mininterval = 0
    watched.advance()
    watched.record("loss:1.5", loss=1.5)
    watched.close()
    seen = ""
    while seen.count("\n") < 2:  # that of the entry, and the bar's when it is closed
        seen += os.read(ours, 100_000).decode()
    file.close(), os.close(ours)
    assert "1/10 [" in seen and "loss:1.5\r\n" in seen


def test_a_terminal_that_is_gone_ends_no_run(tmp_path, monkeypatch):
    ours, file = terminal(monkeypatch)
    watched = a_monitor(tmp_path)
    watched.bar.mininterval = 0
    os.close(ours)
    for loss in (1.0, 2.0):
        watched.advance()
        watched.record("a line", loss=loss)
        watched.event("a line", "spike")
    watched.close()
    with pytest.raises(OSError):
        file.close()
    happened = [entry.get("event", entry.get("loss")) for entry in entries(tmp_path)]
    assert happened == [1.0, "spike", 2.0, "spike"]


def test_a_log_has_plain_lines_and_each_at_once(tmp_path, monkeypatch):
    with open(tmp_path / "out.log", "w", encoding="utf-8") as out, open(tmp_path / "err.log", "w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        watched = a_monitor(tmp_path)
        watched.advance()
        watched.record("loss:1.5", loss=1.5)
        assert (tmp_path / "out.log").read_text() == "loss:1.5\n"  # what `tail -f` sees now
        watched.event("a spike", "spike")
        assert (tmp_path / "out.log").read_text() == "loss:1.5\na spike\n"
        watched.close()
    assert (tmp_path / "err.log").read_text() == ""


# --- trackers ---------------------------------------------------------------------------------------------------------


class FakeRun:
    def __init__(self, id=None, broken=False):
        self.id, self.broken, self.logged, self.finished = id or "new", broken, [], False

    def log(self, metrics, step):
        if self.broken:
            raise RuntimeError("the service is gone")
        self.logged.append((step, metrics))

    def finish(self):
        self.finished = True


def fake_tracker(monkeypatch, name):
    """A module of that name whose init notes how it was called."""
    module, calls = types.ModuleType(name), []
    module.init = lambda **how: calls.append(how) or FakeRun(how["id"])
    monkeypatch.setitem(sys.modules, name, module)
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "SWANLAB_MODE", "SWANLAB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    return calls


def tracker_args(tmp_path, name):
    return SimpleNamespace(
        use_wandb=name, wandb_project="MiniMind-Toy", save_dir=tmp_path, data_path=["a", "b"], lr=0.1
    )


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_tracker_is_offline_unless_asked_otherwise(tmp_path, monkeypatch, name):
    calls, upper = fake_tracker(monkeypatch, name), name.upper()
    modes = [
        {},
        {f"{upper}_MODE": ""},
        {f"{upper}_API_KEY": "k"},
        {f"{upper}_MODE": "disabled", f"{upper}_API_KEY": "k"},
    ]
    for variables in modes:
        with monkeypatch.context() as patch:
            for variable, value in variables.items():
                patch.setenv(variable, value)
            start_tracker(tracker_args(tmp_path, name), None, tmp_path / "toy-1")
    assert [call["mode"] for call in calls] == ["offline", "offline", "online", "disabled"]
    assert calls[0]["project"] == "MiniMind-Toy" and calls[0]["name"] == "toy-1" and calls[0]["resume"] is None
    assert calls[0]["config"]["save_dir"] == str(tmp_path) and calls[0]["config"]["data_path"] == ["a", "b"]
    assert str(tmp_path / "toy-1") in (calls[0].get("dir"), os.path.dirname(calls[0].get("log_dir", "")))


def test_wandb_is_not_shown_an_empty_mode(tmp_path, monkeypatch):
    """The real one refuses to start then, whatever mode it is passed."""
    fake_tracker(monkeypatch, "wandb")
    monkeypatch.setenv("WANDB_MODE", "")
    start_tracker(tracker_args(tmp_path, "wandb"), None, tmp_path)
    assert "WANDB_MODE" not in os.environ


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_resumed_run_goes_on_in_its_tracker(tmp_path, monkeypatch, name):
    calls = fake_tracker(monkeypatch, name)
    run = start_tracker(tracker_args(tmp_path, name), "abc123", tmp_path)
    assert (calls[0]["id"], calls[0]["resume"], run.id) == ("abc123", "allow", "abc123")


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_tracker_that_is_not_installed_is_an_error_with_the_command(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"pip install {name}"):
        start_tracker(tracker_args(tmp_path, name), None, tmp_path)
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))  # as a folder of that name imports
    with pytest.raises(ValueError, match=f"pip install {name}"):
        start_tracker(tracker_args(tmp_path, name), None, tmp_path)


def test_trackers_get_numbers_by_update_and_are_finished(tmp_path):
    run = FakeRun()
    watched = a_monitor(tmp_path, tracker=run, done=0)
    watched.advance()
    watched.record("a line", loss=2.5, grad_norm=math.nan, note="text", flag=True)
    watched.close()
    assert run.logged == [(1, {"loss": 2.5})] and run.finished


def test_a_tracker_that_fails_is_left_alone(tmp_path, capsys):
    watched = a_monitor(tmp_path, tracker=FakeRun(broken=True))
    watched.record(loss=1.0)
    watched.record(loss=2.0)
    watched.close()
    assert capsys.readouterr().out.count("the service is gone") == 1
    assert [entry.get("loss", entry.get("event")) for entry in entries(tmp_path)] == [1.0, "tracker_lost", 2.0]


# --- TensorBoard ------------------------------------------------------------------------------------------------------


class FakeWriter:
    made = []

    def __init__(self, folder, purge_step, flush_secs):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
        FakeWriter.made.append(self)

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def close(self):
        self.closed = True


@pytest.fixture
def tensorboard(monkeypatch):
    package, ours = types.ModuleType("tensorboard"), types.ModuleType("torch.utils.tensorboard")
    package.__spec__, ours.SummaryWriter = ModuleSpec("tensorboard", None), FakeWriter
    monkeypatch.setitem(sys.modules, "tensorboard", package)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", ours)
    monkeypatch.setattr(FakeWriter, "made", [])
    return ours


def test_tensorboard_gets_events_with_their_tags(tmp_path, tensorboard):
    watched = a_monitor(tmp_path, tensorboard=True, done=4)
    watched.advance()
    watched.record(loss=2.5, lr=1e-3, epoch=1, step=5, tokens=100, val_bits_per_byte=1.2, regression_pass_rate=0.75)
    watched.record(**{"act_std/0": 0.5, "reward": 3.0, "update_ratio": None})
    watched.close()
    (writer,) = FakeWriter.made
    assert writer.scalars == [
        ("Training/Loss", 2.5, 5),
        ("Training/LearningRate", 1e-3, 5),
        ("Validation/BitsPerByte", 1.2, 5),
        ("Regression/PassRate", 0.75, 5),
        ("Activations/act_std/0", 0.5, 5),
        ("Extra/reward", 3.0, 5),
    ]
    assert (writer.folder, writer.purge_step, writer.closed) == (str(tmp_path), 5, True)


def test_tensorboard_is_left_alone_unless_wanted_and_installed(tmp_path, tensorboard, monkeypatch):
    a_monitor(tmp_path, tensorboard=False).close()
    monkeypatch.delitem(sys.modules, "tensorboard")
    monkeypatch.setattr(monitor_module.importlib.util, "find_spec", lambda name: None)
    a_monitor(tmp_path, tensorboard=True).close()
    assert not FakeWriter.made


def test_a_tensorboard_that_does_not_work_is_said(tmp_path, tensorboard, capsys):
    del tensorboard.SummaryWriter
    a_monitor(tmp_path, tensorboard=True).record(loss=1.0)
    assert "no TensorBoard events: ImportError" in capsys.readouterr().out and len(entries(tmp_path)) == 1


# --- probes -----------------------------------------------------------------------------------------------------------


def test_update_ratio_by_hand():
    """(3, 4) and 12 have norm 13; they move by (0, 3) and 4, so by 5, to (3, 7) and 16."""
    a, b = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([[12.0]]))
    probe = probes.UpdateProbe(iter([a, b]))
    for _ in range(2):  # the second time from where the first one left
        probe.before()
        with torch.no_grad():
            a += torch.tensor([0.0, 3.0])
            b += 4
        norm, ratio = probe.after().tolist()
        wanted = math.sqrt(sum(float(p.detach().pow(2).sum()) for p in (a, b)))
        assert norm == pytest.approx(wanted) and ratio == pytest.approx(5 / wanted)
        assert probe.copies is None
    assert a.tolist() == [3.0, 10.0] and not probe.after.__self__.parameters[0].grad_fn


def test_update_ratio_of_what_stays_and_of_zeros():
    zero = nn.Parameter(torch.zeros(3))
    probe = probes.UpdateProbe([zero])
    probe.before()
    assert probe.after().tolist() == [0.0, 0.0]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return torch.nn.functional.hardshrink(self.linear(x) - 0.3, 0.2), None  # zeros, and the largest below them


class Blocks(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(1, 1) for _ in range(5)])  # more of them, but smaller
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.checkpointed, self.outputs = checkpointed, []

    def forward(self, x):
        self.outputs = []
        for layer in self.layers:
            if self.checkpointed:
                x, _ = torch.utils.checkpoint.checkpoint(layer.__call__, x, use_reentrant=False)
            else:
                x, _ = layer(x)
            self.outputs.append(x.detach().clone())
        return x


def naive(model):
    """The statistics over plain lists of numbers."""
    found = {}
    for number, output in enumerate(model.outputs):
        values = output.flatten().tolist()
        mean = sum(values) / len(values)
        found[f"act_mean/{number}"] = mean
        found[f"act_std/{number}"] = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        found[f"act_absmax/{number}"] = max(abs(value) for value in values)
        found[f"act_zero/{number}"] = sum(value == 0 for value in values) / len(values)
    return found


def numbers(collected):
    return {name: value.item() for name, value in collected.items()}


def bare(model):
    return not any(layer._forward_hooks for layer in model.layers)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_activations_are_those_of_the_next_forward_alone(checkpointed):
    torch.manual_seed(0)
    model = Blocks(checkpointed)
    probe = probes.ActivationProbe(model)
    model(torch.randn(4, 6))
    assert probe.collect() == {} and bare(model)
    for _ in range(2):
        probe.start()
        out = model(torch.randn(4, 6, requires_grad=True))
        wanted = naive(model)
        out.sum().backward()  # with checkpoints the blocks run once more
        model(torch.randn(4, 6) * 100)
        assert bare(model)
        found = numbers(probe.collect())
        assert found == pytest.approx(wanted, abs=1e-6) and len(found) == 12 and 0 < found["act_zero/0"] < 1
    assert probe.collect() == {}


def test_a_watch_that_saw_nothing_leaves_no_hooks():
    model = Blocks()
    probe = probes.ActivationProbe(model)
    probe.start()
    probe.start()
    assert not bare(model)
    assert probe.collect() == {} and bare(model)
    with pytest.raises(ValueError, match="no ModuleList"):
        probes.ActivationProbe(nn.Linear(2, 2))


def test_activations_of_compiled_blocks_without_compiling_again():
    torch.manual_seed(0)
    torch.compiler.reset()
    model, graphs = Blocks(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    for layer in model.layers:
        layer.compile(backend=backend)
    probe = probes.ActivationProbe(model)
    model(torch.randn(4, 6))
    before = len(graphs)
    untouched = [layer._compiled_call_impl for layer in model.layers]
    for _ in range(2):
        probe.start()
        model(torch.randn(4, 6))
        assert numbers(probe.collect()) == pytest.approx(naive(model), abs=1e-6)
        assert [layer._compiled_call_impl for layer in model.layers] == untouched
    model(torch.randn(4, 6))
    assert len(graphs) == before > 0


def test_the_models_own_blocks_are_found():
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    for moe in (False, True):
        config = MiniMindConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, use_moe=moe, n_routed_experts=4
        )
        model = MiniMindForCausalLM(config)
        probe = probes.ActivationProbe(model)
        assert probe.blocks == list(model.model.layers)
        probe.start()
        states = model(torch.arange(12)[None], output_hidden_states=True).hidden_states
        assert probe.collect()["act_std/0"].item() == pytest.approx(states[1].std(correction=0).item(), rel=1e-5)


def test_resources_are_shares_and_sizes():
    for _ in range(2):
        seen = probes.resources("cpu")
    assert 0 <= seen["cpu_load"] <= 1 and set(seen) == {"cpu_load", "memory_gb"}
    assert 0.05 < seen["memory_gb"] < 50  # torch alone takes more than 50 MB


def test_cpu_load_without_psutil_is_that_of_this_process(monkeypatch):
    monkeypatch.setattr(probes, "psutil", None)
    monkeypatch.setattr(probes.os, "cpu_count", lambda: 1)
    own = probes.Resources()
    time.sleep(0.2)
    assert own("cpu")["cpu_load"] < 0.5
    began, cpu = time.monotonic(), time.process_time()
    while time.monotonic() - began < 0.3:
        pass
    busy = (time.process_time() - cpu) / (time.monotonic() - began)  # less than 1 where others want the CPU, too
    assert own("cpu")["cpu_load"] == pytest.approx(busy, abs=0.2)


def test_psutil_is_asked_where_it_is_there(monkeypatch):
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=3_000_000_000))
    monkeypatch.setattr(probes, "psutil", SimpleNamespace(cpu_percent=lambda: 75.0, Process=lambda: process))
    assert probes.Resources()("cpu") == {"cpu_load": 0.75, "memory_gb": 3.0}


def test_a_gpu_load_that_cannot_be_had_is_asked_for_once(monkeypatch):
    asked = []

    def utilization(device):
        asked.append(device)
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5_000_000_000)
    own = probes.Resources()
    for _ in range(3):
        seen = own("cuda:0")
    assert len(asked) == 1 and seen["gpu_memory_gb"] == 5.0 and "gpu_load" not in seen
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 80)
    assert probes.Resources()("cuda:0")["gpu_load"] == 0.8


def test_hints_name_the_flag():
    assert probes.hints(0.3) == probes.hints(0.1, gpu_load=0.9, text_share=0.8) == []
    (late,) = probes.hints(0.45, gpu_load=0.2)  # a GPU that waits for data is not to blame
    assert "45%" in late and "--num_workers" in late
    idle, empty = probes.hints(0.1, gpu_load=0.3, text_share=0.5)
    assert "--batch_size" in idle and "--packing 1" in empty
