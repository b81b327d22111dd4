"""What can go wrong in a run: numbers, memory, disks, signals, other processes. It is said, and nothing is lost."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch

from conftest import ROOT, run_script
from model.model_minimind import MiniMindForCausalLM
from model.weights import load_model, read_sidecar, read_state_dict
from toy_run import TOKENS, RandomTokens, Stop, collate, config, interrupt, parse, train
from trainer import saving, train_pretrain
from trainer.checkpoint import Checkpoints, read_state
from trainer.guard import SPIKE_FROM, NumberGuard
from trainer.stopping import EarlyStopping, StopSignals
from trainer.train_run import TrainRun


def flags_in(folder, *flags):
    return ["--save_dir", folder / "out", "--checkpoint_dir", folder / "checkpoints", *flags]


def toy(folder, *flags):
    return train(parse(flags_in(folder, *flags)))


def weights(folder, name="toy_32"):
    return read_state_dict(folder / "out" / f"{name}.pth")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run_folder(folder):
    return max((folder / "out/runs").glob("toy_32-*"), key=lambda path: path.stat().st_mtime_ns)


def metrics(folder):
    return [json.loads(line) for line in (run_folder(folder) / "metrics.jsonl").read_text("utf-8").splitlines()]


def events(folder, kind):
    return [entry for entry in metrics(folder) if entry.get("event") == kind]


def summary(folder):
    return json.loads((run_folder(folder) / "summary.json").read_text("utf-8"))


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch):
    """Batches that hold this row have a loss that is not a number."""

    def poison(row):
        first = RandomTokens(64).ids[row]
        real = train_pretrain.compute_loss

        def compute_loss(model, batch):
            loss_sum, tokens, aux_loss = real(model, batch)
            bad = model.training and (batch["input_ids"] == first).all(dim=1).any()
            return loss_sum * (math.nan if bad else 1.0), tokens, aux_loss

        monkeypatch.setattr(train_pretrain, "compute_loss", compute_loss)

    return poison


@pytest.mark.parametrize("log_interval", [1, 7])
def test_a_bad_row_costs_its_update_and_is_named(tmp_path, poisoned, capsys, log_interval):
    poisoned(11)
    toy(tmp_path, "--rows", 36, "--epochs", 2, "--log_interval", log_interval)
    bad = events(tmp_path, "bad_update")
    assert len(bad) == 2 and summary(tmp_path)["counts"]["bad_updates"] == 2  # once in each epoch
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(lines) == 2 and all("row 11" in line and line.count("row ") == 4 for line in lines)
    logged = [entry for entry in metrics(tmp_path) if "lr" in entry]
    assert all(entry["loss"] is not None for entry in logged) == (log_interval > 1)
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path).values())


def test_only_the_batch_of_the_window_that_is_bad_is_named(tmp_path, poisoned, capsys):
    poisoned(5)
    toy(tmp_path, "--rows", 36, "--epochs", 1, "--batch_size", 2, "--accumulation_steps", 6)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert "row 5" in line and line.count("row ") == 2


def test_the_bad_update_changes_neither_weights_nor_moments(tmp_path, poisoned):
    """As if its rows had never been there, but for the schedule, which is constant here."""
    flags = ["--rows", 8, "--epochs", 1, "--batch_size", 4, "--lr_schedule", "constant", "--warmup_steps", 0]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(42)).tolist()
    poisoned(order[6])  # in the second and last update
    toy(tmp_path / "poisoned", *flags)
    toy(tmp_path / "short", *flags, "--max_steps", 1)
    assert same_bits(weights(tmp_path / "poisoned"), weights(tmp_path / "short"))


def test_the_run_stops_after_so_many_bad_updates(tmp_path, monkeypatch):
    real = train_pretrain.compute_loss
    monkeypatch.setattr(train_pretrain, "compute_loss", lambda m, b: [real(m, b)[0] * math.inf, *real(m, b)[1:]])
    with pytest.raises(ValueError, match="in the last 3 updates.*--max_bad_updates.*Lower --learning_rate"):
        toy(tmp_path, "--rows", 36, "--max_bad_updates", 3)
    assert summary(tmp_path)["status"] == "failed" and summary(tmp_path)["updates"] == 3
    assert not (tmp_path / "out/toy_32.pth").exists()


def without_labels(chosen):
    def collating(rows):
        batch = collate(rows)
        for row, (ids, _) in enumerate(rows):
            if any(torch.equal(ids, RandomTokens(64).ids[index]) for index in chosen):
                batch["labels"][row] = -100
        return batch

    return collating


def toy_with(folder, collate_rows, *flags):
    args = parse(flags_in(folder, *flags))
    train_pretrain.init_environment(args)
    lm_config = config(args)
    with TrainRun(args, lm_config, MiniMindForCausalLM(lm_config), RandomTokens(args.rows), collate_rows) as run:
        for epoch in run.epochs():
            train_pretrain.train_epoch(epoch, run)


def test_a_window_without_labels_changes_nothing_and_is_counted(tmp_path):
    """Weight decay and momentum would move the weights even with a gradient of zero."""
    flags = ["--rows", 8, "--epochs", 1, "--batch_size", 4, "--lr_schedule", "constant", "--warmup_steps", 0]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(42)).tolist()
    toy_with(tmp_path / "empty", without_labels(order[4:]), *flags)
    toy_with(tmp_path / "short", collate, *flags, "--max_steps", 1)
    assert same_bits(weights(tmp_path / "empty"), weights(tmp_path / "short"))
    assert summary(tmp_path / "empty")["counts"]["empty_batches"] == 1
    assert summary(tmp_path / "empty")["counts"]["bad_updates"] == 0
    assert [entry["loss"] is None for entry in metrics(tmp_path / "empty") if "lr" in entry] == [False, True]


def test_a_batch_without_labels_leaves_the_rest_of_its_window_alone(tmp_path):
    """The mean is over the tokens that there are: as in one big batch of the same rows."""
    order = torch.randperm(8, generator=torch.Generator().manual_seed(42)).tolist()
    flags = ["--rows", 8, "--epochs", 1]
    empty = without_labels(order[2:4])
    toy_with(tmp_path / "parts", empty, *flags, "--batch_size", 2, "--accumulation_steps", 4)
    toy_with(tmp_path / "whole", empty, *flags, "--batch_size", 8)
    assert largest_difference(weights(tmp_path / "parts"), weights(tmp_path / "whole")) < 2e-5
    assert summary(tmp_path / "parts")["counts"]["empty_batches"] == 1


def closed(guard, losses):
    for number, loss in enumerate(losses, start=1):
        guard.add(number - 1, torch.tensor(loss * 10.0), torch.tensor(0.0), torch.tensor(10.0), True)
        guard.close(number, torch.tensor(loss), torch.tensor(not math.isfinite(loss)))
    return guard.read()


def test_a_spike_is_told_from_noise():
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 0.1
    losses = [5.0 - 0.005 * i + n for i, n in enumerate(noise.tolist())]
    guard = NumberGuard()
    assert guard.judge(closed(guard, losses)) == []
    guard = NumberGuard()
    ((update, before),) = guard.judge(closed(guard, [*losses[:150], 9.0, *losses[150:]]))
    assert update.number == 151 and update.mean == pytest.approx(9.0) and before == pytest.approx(4.5, abs=0.1)
    assert guard.counts == {"bad_updates": 0, "empty_batches": 0, "spikes": 1}
    guard = NumberGuard()
    assert guard.judge(closed(guard, [*[3.0] * (SPIKE_FROM - 1), 9.0])) == []  # too early to know


def test_bad_updates_in_a_row_begin_anew_after_a_good_one():
    guard = NumberGuard()
    guard.judge(closed(guard, [1.0, math.nan, math.nan, 1.0, math.inf]))
    assert (guard.bad_in_a_row, guard.counts["bad_updates"]) == (1, 3)
    again = NumberGuard()
    again.load_state_dict(guard.state_dict())
    again.judge(closed(again, [math.nan]))
    assert (again.bad_in_a_row, again.counts["bad_updates"]) == (2, 4)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_out_of_memory_names_the_flags_that_help(tmp_path):
    with pytest.raises(MemoryError, match="memory at step 1, 8 rows of 24 tokens.*--batch_size 4 --accumulation"):
        toy(tmp_path, "--rows", 36, "--batch_size", 8, "--oom", 3)
    assert summary(tmp_path)["status"] == "failed"


@pytest.mark.parametrize("accumulation", [1, 3])
def test_shrinking_gives_the_same_weights(tmp_path, capsys, accumulation):
    """Bit for bit those of a run with the smaller batch and more accumulation."""
    toy(tmp_path / "small", "--rows", 37, "--batch_size", 2, "--accumulation_steps", 4 * accumulation)
    capsys.readouterr()
    flags = ["--rows", 37, "--batch_size", 8, "--accumulation_steps", accumulation]
    toy(tmp_path / "pieces", *flags, "--oom_policy", "shrink", "--oom", 3)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("out of memory")]
    assert [line.split(":")[1].split("pieces")[0] for line in lines] == [" each batch in 2 ", " each batch in 4 "]
    assert same_bits(weights(tmp_path / "small"), weights(tmp_path / "pieces"))
    assert summary(tmp_path / "pieces")["counts"]["shrunk"] == 2
    pairs = zip(metrics(tmp_path / "small"), [m for m in metrics(tmp_path / "pieces") if "event" not in m], strict=True)
    assert all(a.get("loss", a.get("val_loss")) == pytest.approx(b.get("loss", b.get("val_loss"))) for a, b in pairs)


def test_memory_that_runs_out_in_the_backward_pass(tmp_path, monkeypatch):
    """Half of the gradients are there already: they must not count twice."""
    toy(tmp_path / "small", "--rows", 24, "--batch_size", 2, "--accumulation_steps", 8)
    real, calls = TrainRun.backward, []

    def failing(self, loss):
        calls.append(1)
        real(self, loss)
        if len(calls) in (2, 5):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(TrainRun, "backward", failing)
    flags = ["--rows", 24, "--batch_size", 8, "--accumulation_steps", 2]
    toy(tmp_path / "pieces", *flags, "--oom_policy", "shrink")
    assert same_bits(weights(tmp_path / "small"), weights(tmp_path / "pieces"))


def test_one_row_that_does_not_fit_ends_the_run(tmp_path):
    with pytest.raises(MemoryError, match="one row at a time does not fit"):
        toy(tmp_path, "--rows", 36, "--oom_policy", "shrink", "--oom", 0)


def test_other_errors_are_not_taken_for_memory(tmp_path, monkeypatch):
    def broken(model, batch):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(train_pretrain, "compute_loss", broken)
    with pytest.raises(RuntimeError, match="shapes cannot"):
        toy(tmp_path, "--rows", 36, "--oom_policy", "shrink")


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "status"), [("TERM", 143), ("INT", 130)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, capsys, name, status):
    flags = ["--rows", 37, "--dropout", 0.1, "--save_minutes", 60]
    toy(tmp_path / "whole", *flags)
    with pytest.raises(SystemExit) as stopped:
        toy(tmp_path / "cut", *flags, "--send", f"{name}:13")
    assert stopped.value.code == status
    said = capsys.readouterr().out
    assert f"SIG{name}: finishing this step and saving" in said
    assert f"stopped by SIG{name} after update 13 of 20: the same command with --from_resume 1 goes on" in said
    assert summary(tmp_path / "cut")["status"] == "stopped" and summary(tmp_path / "cut")["saved_update"] == 13
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    toy(tmp_path / "cut", *flags, "--from_resume", 1)
    assert "resumed toy_32_resume.pth: epoch 2, step 3/10" in capsys.readouterr().out
    assert same_bits(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert len(list((tmp_path / "cut/out/runs").iterdir())) == 1  # the same record goes on
    assert {path.name for path in run_folder(tmp_path / "cut").iterdir()} >= {"config.json", "config-2.json"}


def test_a_second_signal_stops_at_once_without_saving(tmp_path):
    done = run_script("tests/toy_run.py", *flags_in(tmp_path, "--rows", 37, "--send", "INT,INT:3"))
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_torchrun_repeats_a_signal(monkeypatch, name):
    """Its agent hands on what the terminal has already told everyone: that is no second one."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    before = signal.getsignal(signal.Signals[name])
    signals = StopSignals(lambda text: None)
    try:
        os.kill(os.getpid(), signal.Signals[name])
        os.kill(os.getpid(), signal.Signals[name])
        assert signals.received == signal.Signals[name]
    finally:
        signals.restore()
    assert signal.getsignal(signal.Signals[name]) is before


def test_a_signal_in_an_evaluation_lets_it_finish(tmp_path, monkeypatch):
    flags = ["--rows", 37, "--save_minutes", 60, "--eval_interval", 4]
    toy(tmp_path / "whole", *flags)
    real = TrainRun.val_batches

    def interrupted(self):
        for number, batch in enumerate(real(self)):
            if self.updates == 8 and number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(TrainRun, "val_batches", interrupted)
    with pytest.raises(SystemExit):
        toy(tmp_path / "cut", *flags)
    monkeypatch.setattr(TrainRun, "val_batches", real)
    toy(tmp_path / "cut", *flags, "--from_resume", 1)
    assert same_bits(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert same_bits(weights(tmp_path / "whole", "toy_best_32"), weights(tmp_path / "cut", "toy_best_32"))
    losses = [
        [(m["update"], m["val_loss"]) for m in metrics(tmp_path / p) if "val_loss" in m] for p in ("whole", "cut")
    ]
    assert losses[0] == losses[1] and [update for update, _ in losses[0]] == [4, 8, 10, 12, 16, 20]


# --- saving -----------------------------------------------------------------------------------------------------------


def test_a_save_that_fails_keeps_the_old_one_and_training_goes_on(tmp_path, monkeypatch, capsys):
    flags = ["--rows", 37, "--save_interval", 4]
    toy(tmp_path / "whole", *flags)
    real, calls = Checkpoints.write, []

    def sometimes(self, state):
        calls.append(state["step"])
        if len(calls) in (2, 3):
            raise OSError(28, "No space left on device")
        real(self, state)

    monkeypatch.setattr(Checkpoints, "write", sometimes)
    toy(tmp_path / "full", *flags)
    said = capsys.readouterr().out
    assert "update 8 could not be saved ([Errno 28] No space left on device); update 4 is on the disk; training" in said
    assert calls == [4, 8, 10, 4, 8, 10]
    assert same_bits(weights(tmp_path / "whole"), weights(tmp_path / "full"))
    assert len(events(tmp_path / "full", "failed_save")) == summary(tmp_path / "full")["counts"]["failed_saves"] == 2


@pytest.mark.parametrize("flag", ["--save_dir", "--checkpoint_dir"])
def test_a_folder_that_cannot_be_written_is_said_before_the_first_step(tmp_path, capsys, flag):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(OSError, match=f"nothing can be saved in {tmp_path}/file/below: .*Name another folder"):
        toy(tmp_path, "--rows", 37, flag, tmp_path / "file/below")
    assert "Epoch:" not in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_any_more_fails_only_at_the_end(tmp_path, monkeypatch, capsys):
    """What is there stays, training goes on, the weights are written, the end is an error."""
    monkeypatch.setattr(saving, "PATIENCE", 0.0)
    real = TrainRun.batches

    def spoiled(self, epoch):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        (tmp_path / "checkpoints").write_text("a file now", encoding="utf-8")
        yield from real(self, epoch)

    monkeypatch.setattr(TrainRun, "batches", spoiled)
    with pytest.raises(OSError, match="the last save failed"):
        toy(tmp_path, "--rows", 37, "--epochs", 1)
    assert "nothing is yet on the disk; training goes on" in capsys.readouterr().out
    assert read_sidecar(tmp_path / "out/toy_32.pth")["update"] == 10


def test_the_last_save_is_tried_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(saving, "RETRY", 0.01)
    real, calls = Checkpoints.write, []

    def full_for_a_while(self, state):
        calls.append(1)
        if len(calls) < 4:
            raise OSError(28, "No space left on device")
        real(self, state)

    monkeypatch.setattr(Checkpoints, "write", full_for_a_while)
    toy(tmp_path, "--rows", 8, "--epochs", 1)
    assert capsys.readouterr().out.count("trying again in 0 s: free some space") == 3
    assert (tmp_path / "checkpoints/toy_32_resume.pth").exists()


def test_saves_are_by_time_unless_an_interval_is_given(tmp_path, monkeypatch):
    saved = []
    real = Checkpoints.write
    monkeypatch.setattr(Checkpoints, "write", lambda self, state: [saved.append(state["step"]), real(self, state)])
    toy(tmp_path / "by time", "--rows", 37, "--epochs", 1)
    assert saved == [10]  # in no time there is only the end of the epoch
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(saving.time, "monotonic", lambda: float(next(clock)))  # twenty seconds at each look
    saved.clear()
    toy(tmp_path / "slow", "--rows", 37, "--epochs", 1, "--save_minutes", 2)
    assert 1 < len(saved) < 10 and saved[-1] == 10


def test_saving_takes_a_small_share_of_the_time():
    class Args:
        save_interval, save_minutes, keep_checkpoints = 0, 1.0, 2
        save_weight, checkpoint_dir = "toy", "."

    saver = saving.Saver(Args, config(parse([])), None, {})
    saver.tried(seconds=100.0)
    assert saver._next - time.monotonic() == pytest.approx(100 / saving.SAVE_SHARE, rel=1e-3)
    saver.tried(seconds=0.1)
    assert saver._next - time.monotonic() == pytest.approx(60, rel=1e-3)


# --- validation -------------------------------------------------------------------------------------------------------


def test_best_weights_are_those_of_the_lowest_held_back_loss(tmp_path):
    toy(tmp_path, "--rows", 37, "--eval_interval", 3, "--learning_rate", 3e-2)
    losses = {m["update"]: m["val_loss"] for m in metrics(tmp_path) if "val_loss" in m}
    best = min(losses, key=losses.get)
    assert best not in (3, 20)  # or the test shows nothing
    path = tmp_path / "out/toy_best_32.pth"
    assert read_sidecar(path)["update"] == best == summary(tmp_path)["best"]["update"]
    rows = RandomTokens(11, seed=1)
    with torch.no_grad():
        loss = load_model(path)(**collate([rows[i] for i in range(11)])).loss.item()
    assert loss == pytest.approx(losses[best], abs=1e-5)


def test_early_stopping_ends_the_run_with_its_own_message(tmp_path, capsys):
    flags = ["--rows", 37, "--epochs", 20, "--eval_interval", 5, "--patience", 3, "--learning_rate", 3e-2]
    run = toy(tmp_path, *flags)
    losses = [m["val_loss"] for m in metrics(tmp_path) if "val_loss" in m]
    assert run.updates == 5 * len(losses) < 200 and min(losses) == losses[-4]
    said = capsys.readouterr().out
    assert "stopping early: the held-back loss has not fallen by more than 0 in 3 validations" in said
    assert "the best weights are toy_best, of update" in said
    assert summary(tmp_path)["status"] == "stopped early"
    assert read_sidecar(tmp_path / "out/toy_32.pth")["update"] == run.updates
    before = weights(tmp_path)
    toy(tmp_path, *flags, "--from_resume", 1)
    assert "the run had stopped early" in capsys.readouterr().out
    assert same_bits(before, weights(tmp_path))


def test_patience_needs_held_back_rows(tmp_path):
    with pytest.raises(ValueError, match="--patience looks at a held-back loss.*--val_ratio"):
        toy_with(tmp_path, collate, "--patience", 2)


@pytest.mark.parametrize("flag", ["--eval_interval", "--save_minutes", "--patience", "--max_steps", "--val_ratio"])
def test_negative_numbers_are_refused_by_their_flag(flag, capsys):
    with pytest.raises(SystemExit):
        parse([flag, "-1"])
    assert f"argument {flag}: '-1' is no" in capsys.readouterr().err


def test_early_stopping_by_hand():
    early = EarlyStopping(patience=2, min_delta=0.1)
    lowest = []
    for update, loss in enumerate([3.0, 2.95, 2.85, 2.8, 2.84]):
        lowest.append(early.update(loss))
        if lowest[-1]:
            early.keep(loss, update)
    assert lowest == [True, True, True, True, False]
    assert (early.best, early.best_update, early.is_over) == (2.8, 3, True)  # no gain of 0.1 since 2.85
    assert not EarlyStopping().is_over
    early = EarlyStopping(patience=2)
    assert not early.update(math.nan) and early.without_gain == 1
    with pytest.raises(ValueError, match="--patience -1"):
        EarlyStopping(-1)


# --- several processes ------------------------------------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(folder, count, *flags, port, timeout=120):
    command = [*TORCHRUN, "--nproc_per_node", count, "--master_port", port, ROOT / "tests/toy_run.py"]
    command = [*command, *flags_in(folder, *flags)]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_resume_on_another_number_of_processes(tmp_path, before, after):
    """Every row once, and the weights of an uninterrupted run of one process."""
    flags = ["--rows", 37, "--save_interval", 1, "--lr_schedule", "linear"]
    toy(tmp_path / "one", *flags, "--batch_size", 8)
    each = ["--batch_size", 8 // before]
    stop = ["--send", "TERM:3:0"]
    if before == 1:
        with pytest.raises(SystemExit):
            toy(tmp_path / "changed", *flags, *each, *stop)
    else:
        first = torchrun(tmp_path / "changed", before, *flags, *each, *stop, port=29521)
        assert "stopped by SIGTERM after update 3" in first.stdout, first.stdout + first.stderr
    if after == 1:
        toy(tmp_path / "changed", *flags, *each, "--from_resume", 1)
    else:
        second = torchrun(tmp_path / "changed", after, *flags, *each, "--from_resume", 1, port=29522)
        assert second.returncode == 0, second.stdout + second.stderr
        assert f"{after} process(es) from now on: each update stays one of 8 rows" in second.stdout
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "changed")) < 1e-5
    one, changed = metrics(tmp_path / "one"), metrics(tmp_path / "changed")
    assert [m["tokens"] for m in one if "lr" in m] == [m["tokens"] for m in changed if "lr" in m]


@pytest.mark.slow
def test_memory_of_one_process_runs_out(tmp_path):
    """All of them cut their batches, and the weights are those of one process with room enough."""
    toy(tmp_path / "one", "--rows", 37, "--batch_size", 8)
    flags = ["--rows", 37, "--batch_size", 4, "--oom_policy", "shrink", "--oom", "2:1"]
    done = torchrun(tmp_path / "two", 2, *flags, port=29523)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "each batch in 2 pieces" in done.stdout
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_with_a_message(tmp_path, rank):
    began = time.monotonic()
    done = torchrun(tmp_path, 2, "--rows", 37, "--save_interval", 1, "--send", f"KILL:4:{rank}", port=29524 + rank)
    assert done.returncode != 0 and time.monotonic() - began < 60
    assert "another process of this run has ended or does not answer" in done.stderr, done.stdout + done.stderr
    assert "--from_resume 1 goes on from the last save" in done.stderr
    again = torchrun(tmp_path, 2, "--rows", 37, "--from_resume", 1, port=29526 + rank)
    assert again.returncode == 0 and "resumed toy_32_resume.pth: epoch 1, step 3/5" in again.stdout
    toy(tmp_path / "whole", "--rows", 37, "--batch_size", 8)
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path)) < 1e-5


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_rows_per_update_may_be_made_otherwise(tmp_path, capsys):
    """A smaller batch with more accumulation is the same update: what one does after running out of memory."""
    flags = ["--rows", 37, "--save_interval", 1]
    toy(tmp_path / "whole", *flags, "--batch_size", 8)
    with pytest.raises(Stop):
        toy(tmp_path / "cut", *flags, "--batch_size", 8, "--stop_after", 2)
    toy(tmp_path / "cut", *flags, "--batch_size", 2, "--accumulation_steps", 4, "--from_resume", 1)
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "cut")) < 1e-5


def test_resume_says_what_has_changed(tmp_path, capsys, monkeypatch):
    with pytest.raises(Stop):
        toy(tmp_path, "--rows", 37, "--save_interval", 1, "--stop_after", 2, "--dtype", "bfloat16")
    monkeypatch.setattr("trainer.train_run.code_version", lambda root: {"commit": "f" * 40, "digest": "0"})
    capsys.readouterr()
    toy(tmp_path, "--rows", 37, "--from_resume", 1, "--weight_decay", 0.2, "--save_minutes", 1, "--dtype", "auto")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert not any("use_compile" in note or "dtype" in note for note in notes)  # auto then, auto now
    assert "note: --weight_decay was 0.1 before the resume and is 0.2 from now on" in notes
    assert any("the code has changed since the checkpoint (commit" in note and "ffffffffffff" in note for note in notes)


def test_without_a_checkpoint_it_says_so_and_begins(tmp_path, capsys):
    toy(tmp_path, "--rows", 8, "--epochs", 1, "--from_resume", 1)
    assert f"no checkpoint at {tmp_path}/checkpoints/toy_32_resume.pth: starting from the beginning" in (
        capsys.readouterr().out
    )
    assert TOKENS == 24


def test_a_fresh_run_is_not_resumed_from_an_older_one(tmp_path, capsys):
    toy(tmp_path, "--rows", 37)
    with pytest.raises(Stop):
        toy(tmp_path, "--rows", 37, "--learning_rate", 2e-2, "--stop_after", 3)  # before its first save
    kept = tmp_path / "checkpoints/toy_32_resume.prev.pth"
    assert f"the checkpoint of an earlier run of this name is now {kept}" in capsys.readouterr().out
    toy(tmp_path, "--rows", 37, "--learning_rate", 2e-2, "--from_resume", 1)
    assert "starting from the beginning" in capsys.readouterr().out
    toy(tmp_path / "whole", "--rows", 37, "--learning_rate", 2e-2)
    assert same_bits(weights(tmp_path / "whole"), weights(tmp_path))
    assert read_state(kept)["epoch"] == 1


@pytest.mark.slow
def test_processes_change_and_the_same_command_goes_on_twice(tmp_path):
    flags = ["--rows", 37, "--batch_size", 4]
    toy(tmp_path / "one", "--rows", 37, "--batch_size", 8)
    first = torchrun(tmp_path / "many", 2, *flags, "--send", "TERM:2:1", port=29531)
    assert "stopped by SIGTERM after update 2" in first.stdout, first.stdout + first.stderr
    with pytest.raises(SystemExit):
        toy(tmp_path / "many", *flags, "--from_resume", 1, "--send", "TERM:4")
    toy(tmp_path / "many", *flags, "--from_resume", 1)
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "many")) < 1e-5


def test_a_stop_in_mid_interval_loses_no_number(tmp_path, poisoned):
    """What was not logged yet goes into the checkpoint: bad updates, tokens and means are those of a whole run."""
    order = torch.randperm(37, generator=torch.Generator().manual_seed(42)).tolist()
    poisoned(order[9])  # in the third update
    flags = ["--rows", 37, "--log_interval", 4]
    toy(tmp_path / "whole", *flags)
    with pytest.raises(SystemExit):
        toy(tmp_path / "cut", *flags, "--send", "TERM:6")
    assert [entry["rows"] for entry in events(tmp_path / "cut", "bad_update")] == [[f"row {i}" for i in order[8:12]]]
    toy(tmp_path / "cut", *flags, "--from_resume", 1)
    both = [[m for m in metrics(tmp_path / place) if "lr" in m] for place in ("whole", "cut")]
    for name in ("update", "tokens", "loss", "grad_norm"):
        assert [m[name] for m in both[0]] == [m[name] for m in both[1]]
    assert summary(tmp_path / "whole")["counts"] == summary(tmp_path / "cut")["counts"]


def test_a_stop_at_a_bad_update_saves(tmp_path, poisoned):
    order = torch.randperm(37, generator=torch.Generator().manual_seed(42)).tolist()
    poisoned(order[9])
    with pytest.raises(SystemExit):
        toy(tmp_path, "--rows", 37, "--send", "TERM:3")
    assert summary(tmp_path)["saved_update"] == 3


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    def spoil(run):
        with torch.no_grad():
            next(run.model.parameters())[0, 0] = math.nan

    toy(tmp_path, "--rows", 8)
    before = weights(tmp_path)
    args = parse(flags_in(tmp_path, "--rows", 8, "--epochs", 1))
    train_pretrain.init_environment(args)
    lm_config = config(args)
    with pytest.raises(ValueError, match="the weights are not finite at update 2: not saved"):
        with TrainRun(args, lm_config, MiniMindForCausalLM(lm_config), RandomTokens(8), collate) as run:
            interrupt(run, 2, lambda: spoil(run))
            for epoch in run.epochs():
                train_pretrain.train_epoch(epoch, run)
    assert same_bits(before, weights(tmp_path)) and summary(tmp_path)["status"] == "failed"


def test_failed_saves_are_tried_again_after_a_while_not_at_once(tmp_path, monkeypatch):
    calls = []

    def full(self, state):
        calls.append(state["step"])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "write", full)
    monkeypatch.setattr(saving, "PATIENCE", 0.0)
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(saving.time, "monotonic", lambda: float(next(clock)))  # twenty seconds at each look
    with pytest.raises(OSError, match="the last save failed"):
        toy(tmp_path, "--rows", 80, "--epochs", 1, "--save_minutes", 2)
    assert 1 < len(calls) < 8


def test_best_weights_that_could_not_be_saved_are_not_called_the_best(tmp_path, monkeypatch):
    real, failed = saving.save_weights, []

    def failing_once(path, *args, **kwargs):
        if "best" in path.name and not failed:
            failed.append(path)
            raise OSError(28, "No space left on device")
        real(path, *args, **kwargs)

    monkeypatch.setattr(saving, "save_weights", failing_once)
    toy(tmp_path, "--rows", 37, "--eval_interval", 3)
    best = summary(tmp_path)["best"]
    losses = {m["update"]: m["val_loss"] for m in metrics(tmp_path) if "val_loss" in m}
    assert failed and best["update"] != 3 and best["loss"] == losses[best["update"]]
    assert read_sidecar(tmp_path / "out/toy_best_32.pth")["update"] == best["update"]


class Activations:
    """Stands for what a forward pass keeps for the backward pass."""


class Keeping(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kept):
        ctx.kept = kept
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def test_what_did_not_fit_is_let_go_before_the_next_try(tmp_path, monkeypatch):
    """The stage's own names hold the loss, and it the activations: with those alive, halves would not fit either."""
    real, compute_loss, kept, alive = TrainRun.backward, train_pretrain.compute_loss, [], []

    def failing(self, loss):
        if len(kept) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        real(self, loss)

    def looking(model, batch):
        alive.append(any(reference() is not None for reference in kept))
        activations = Activations()
        kept.append(weakref.ref(activations))
        loss_sum, tokens, aux_loss = compute_loss(model, batch)
        return Keeping.apply(loss_sum, activations), tokens, aux_loss

    monkeypatch.setattr(TrainRun, "backward", failing)
    monkeypatch.setattr(train_pretrain, "compute_loss", looking)
    toy(tmp_path, "--rows", 4, "--epochs", 1, "--oom_policy", "shrink")
    assert summary(tmp_path)["counts"]["shrunk"] == 1 and alive[:2] == [False, False]


def test_an_update_that_has_begun_is_not_tried_again(tmp_path, monkeypatch):
    def failing(self, gradient_scale=None):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(TrainRun, "optimizer_step", failing)
    with pytest.raises(MemoryError, match="out of memory at step 1"):
        toy(tmp_path, "--rows", 16, "--oom_policy", "shrink")


def test_another_model_is_refused(tmp_path):
    with pytest.raises(Stop):
        toy(tmp_path, "--rows", 16, "--save_interval", 1, "--stop_after", 2)
    path = tmp_path / "checkpoints/toy_32_resume.pth"
    state = torch.load(path, weights_only=True)
    state["model_config"]["rope_theta"] = 1.0
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"written with another model, rope_theta 1.0 \(now 1000000.0\)"):
        toy(tmp_path, "--rows", 16, "--from_resume", 1)


def test_with_a_scaler_only_a_loss_that_is_not_finite_is_bad_and_all_processes_agree():
    """The scaler finds its scale by gradients that are too large for fp16; a NaN of another process is everyone's."""
    for other, bad in ((0.0, False), (math.nan, True)):
        guard = NumberGuard(scaled=True)
        guard.add(0, torch.tensor(1.0), torch.tensor(0.0), torch.tensor(10.0), True)
        guard.close(1, torch.tensor(math.inf), torch.tensor(True))
        (update,) = guard.read(lambda sums, other=other: sums[:, 0].add_(other))
        assert (update.left_out, update.bad) == (True, bad)
