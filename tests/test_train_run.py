"""TrainRun: windows, processes and interruptions change nothing but the time that a run takes."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT
from model.weights import read_state_dict
from toy_run import RandomTokens, Stop, collate, config, parse, train
from trainer.optimizer import parameter_groups
from trainer.train_run import TrainRun
from trainer.trainer_utils import SkipBatchSampler, get_lr, get_lr_with_warmup, lm_checkpoint


def toy(tmp_path, *flags):
    args = parse(["--save_dir", tmp_path / "out", "--checkpoint_dir", tmp_path / "checkpoints", *flags])
    return train(args)


def weights(tmp_path, name="toy_32"):
    return read_state_dict(tmp_path / "out" / f"{name}.pth")


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def same_bits(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("moe", [0, 1])
def test_accumulation_equals_one_big_batch(tmp_path, moe):
    flags = ["--use_moe", moe, "--epochs", 2, "--rows", 37]
    toy(tmp_path / "big", *flags, "--batch_size", 8)
    toy(tmp_path / "small", *flags, "--batch_size", 2, "--accumulation_steps", 4)
    name = "toy_32_moe" if moe else "toy_32"
    big, small = weights(tmp_path / "big", name), weights(tmp_path / "small", name)
    fresh = config(SimpleNamespace(use_moe=moe, dropout=0))
    assert fresh.use_moe == bool(moe)
    assert largest_difference(big, small) < 2e-5  # Adam divides by tiny second moments: rounding is amplified


def test_gradient_of_a_window_is_that_of_the_mean_over_its_tokens(tmp_path):
    """By hand: the gradient that the optimizer sees against autograd on the mean loss of all rows at once."""
    args = parse(["--save_dir", tmp_path, "--checkpoint_dir", tmp_path, "--batch_size", 2, "--accumulation_steps", 3])
    args.chosen, args.monitor = [], "off"
    torch.manual_seed(0)
    from model.model_minimind import MiniMindForCausalLM

    lm_config = config(args)
    model, rows = MiniMindForCausalLM(lm_config), RandomTokens(6)
    run = TrainRun(args, lm_config, model, rows, collate)
    seen = {}
    run.optimizer_step = lambda gradient_scale: seen.update(
        {name: p.grad * gradient_scale for name, p in model.named_parameters()}
    )
    for _, batch in run.batches(0):
        output = run.model(**batch, return_logits=False)
        run.update(output.loss_sum, output.tokens, output.aux_loss)
    run.signals.restore()

    model.zero_grad()
    batch = collate([rows[i] for i in range(6)])
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    assert seen and max((seen[n] - p.grad).abs().max() for n, p in model.named_parameters()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("rows", [37, 33])  # 33: the last step has one row for two processes
def test_two_processes_equal_one(tmp_path, rows):
    toy(tmp_path / "one", "--rows", rows, "--batch_size", 8)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29511"]
    flags = ["--save_dir", tmp_path / "two/out", "--checkpoint_dir", tmp_path / "two/c", "--rows", rows]
    flags += ["--batch_size", 2, "--accumulation_steps", 2]
    subprocess.run(
        [*command, ROOT / "tests/toy_run.py", *map(str, flags)], check=True, capture_output=True, timeout=120
    )
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 2e-5
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [m["loss"] for m in one if "lr" in m] == pytest.approx([m["loss"] for m in two if "lr" in m], abs=1e-4)
    assert [m["val_loss"] for m in one if "val_loss" in m] == pytest.approx(
        [m["val_loss"] for m in two if "val_loss" in m], abs=1e-4
    )


def metrics(tmp_path):
    newest = max((tmp_path / "out/runs").glob("toy_32-*"), key=lambda folder: folder.stat().st_mtime_ns)
    return [json.loads(line) for line in (newest / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("stop_after", [3, 5, 8])  # in mid-epoch, at the end of epoch 1, in epoch 2
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "muon"])
def test_resume_is_bit_identical(tmp_path, stop_after, kind):
    how = ["--optimizer", "muon", "--dtype", "float32"] if kind == "muon" else ["--dtype", kind]
    if kind == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch 2.9 or later")
    flags = ["--rows", 37, "--accumulation_steps", 2, "--save_interval", 1, "--dropout", 0.1, *how]
    toy(tmp_path / "whole", *flags)
    with pytest.raises(Stop):
        toy(tmp_path / "cut", *flags, "--stop_after", stop_after)
    toy(tmp_path / "cut", *flags, "--from_resume", 1)
    assert same_bits(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    timeless = ("seconds", "tokens_per_second", "eta_minutes", "data_wait", "cpu_load", "memory_gb")
    kept = [[m for m in metrics(tmp_path / place) if m.get("event") != "resumed"] for place in ("whole", "cut")]
    strip = [[{k: v for k, v in m.items() if k not in timeless} for m in entries] for entries in kept]
    assert strip[0] == strip[1]


def test_resume_takes_what_auto_chose(tmp_path):
    flags = ["--rows", 16, "--save_interval", 1]
    with pytest.raises(Stop):
        toy(tmp_path, *flags, "--dtype", "bfloat16", "--stop_after", 2)
    assert toy(tmp_path, *flags, "--dtype", "auto", "--from_resume", 1).args.dtype == "bfloat16"


def test_resume_refuses_other_data(tmp_path):
    toy(tmp_path, "--rows", 16)
    with pytest.raises(ValueError, match=r"rows 16 \(now 17\)"):
        toy(tmp_path, "--rows", 17, "--from_resume", 1)


def test_checkpoint_shows_epoch_and_step(tmp_path):
    with pytest.raises(Stop):
        toy(tmp_path, "--rows", 37, "--save_interval", 1, "--stop_after", 12)
    state = torch.load(tmp_path / "checkpoints/toy_32_resume.pth", weights_only=True)
    assert (state["epoch"], state["step"], state["world_size"]) == (1, 2, 1)
    lm_config = config(SimpleNamespace(use_moe=0, dropout=0))
    assert lm_checkpoint(lm_config, "toy", save_dir=tmp_path / "checkpoints")["step"] == 2
    assert lm_checkpoint(lm_config, "other", save_dir=tmp_path / "checkpoints") is None


def test_fresh_run_keeps_the_old_weights(tmp_path):
    toy(tmp_path, "--rows", 8)
    first = weights(tmp_path)
    toy(tmp_path, "--rows", 8, "--seed", 7)
    assert same_bits(first, weights(tmp_path, "toy_32.prev"))
    assert not same_bits(first, weights(tmp_path))


def test_intervals_and_schedule_count_updates(tmp_path):
    run = toy(tmp_path, "--rows", 37, "--batch_size", 2, "--accumulation_steps", 4, "--warmup_ratio", 0.3)
    assert (run.batches_per_epoch, run.steps_per_epoch, run.total_steps) == (19, 5, 10)
    rates = [m["lr"] for m in metrics(tmp_path) if "lr" in m]
    assert rates == [get_lr_with_warmup(i, 10, 1e-2, 3) for i in range(10)]


def test_max_steps_ends_the_run(tmp_path):
    run = toy(tmp_path, "--rows", 37, "--max_steps", 3, "--epochs", 5)
    assert run.updates == 3 and (tmp_path / "out/toy_32.pth").exists()


def test_validation_is_the_loss_over_all_held_back_tokens(tmp_path):
    run = toy(tmp_path, "--rows", 8)
    rows = RandomTokens(11, seed=1)
    batch = collate([rows[i] for i in range(11)])
    with torch.no_grad():
        expected = run.model.eval()(**batch).loss.item()
    sidecar = json.loads((tmp_path / "out/toy_32.json").read_text())
    assert sidecar["metrics"]["val_loss"] == pytest.approx(expected, abs=1e-5)
    assert sidecar["metrics"]["val_ppl"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert sidecar["stage"] == "Toy" and sidecar["arguments"]["rows"] == 8


def test_a_loss_that_is_not_finite_never_reaches_the_disk(tmp_path):
    toy(tmp_path, "--rows", 8)
    before = weights(tmp_path)
    with pytest.raises(ValueError, match="Lower --learning_rate"):
        toy(tmp_path, "--rows", 64, "--learning_rate", 1e30, "--grad_clip", 1e30)
    assert same_bits(before, weights(tmp_path))


def test_an_update_with_a_gradient_that_is_not_finite_is_left_out(tmp_path, monkeypatch):
    """Weights and moments stay as they are at that update, go on after it, and are finite on the disk."""
    seen = []
    step = TrainRun.optimizer_step

    def poisoned(self, gradient_scale=None):
        before = [p.detach().clone() for p in self.model.parameters()]
        if len(seen) == 1:
            next(self.model.parameters()).grad[0, 0] = math.nan
        step(self, gradient_scale)
        seen.append(all(torch.equal(a, b) for a, b in zip(before, self.model.parameters(), strict=True)))

    monkeypatch.setattr(TrainRun, "optimizer_step", poisoned)
    toy(tmp_path, "--rows", 16, "--epochs", 1, "--save_interval", 1)
    assert seen == [False, True, False, False]
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path).values())


def test_resume_refuses_what_moves_the_rows_and_takes_the_new_rate(tmp_path, capsys):
    with pytest.raises(Stop):
        toy(tmp_path, "--rows", 16, "--save_interval", 1, "--stop_after", 2)
    for flag, value in (("--batch_size", 2), ("--seed", 1), ("--max_seq_len", 12)):
        with pytest.raises(ValueError, match=f"with {flag}"):
            toy(tmp_path, "--rows", 16, flag, value, "--from_resume", 1)
    run = toy(tmp_path, "--rows", 16, "--learning_rate", 3e-3, "--from_resume", 1)
    assert "--learning_rate was 0.01 before the resume and is 0.003 from now on" in capsys.readouterr().out
    assert run.optimizer.param_groups[0]["initial_lr"] == 3e-3


def test_learning_rate():
    assert get_lr(0, 100, 1.0) == pytest.approx(1.0)
    assert get_lr(50, 100, 1.0) == pytest.approx(0.55)
    assert get_lr(100, 100, 1.0) == pytest.approx(0.1)
    assert [get_lr_with_warmup(i, 100, 1.0, 4) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert get_lr_with_warmup(4, 100, 1.0, 4) == pytest.approx(1.0)
    assert get_lr_with_warmup(100, 100, 1.0, 4) == pytest.approx(0.1)
    assert get_lr_with_warmup(0, 1, 1.0, 0) == pytest.approx(1.0)


@pytest.mark.parametrize("rows", range(1, 20))
def test_sampler_gives_every_row_once_over_the_processes(rows):
    order = list(range(100, 100 + rows))
    alone = list(SkipBatchSampler(order, 6))
    shared = [SkipBatchSampler(order, 2, rank=r, world_size=3) for r in range(3)]
    assert len({len(s) for s in shared}) == 1 and len(shared[0]) == len(alone)
    for number, batch in enumerate(alone):
        together = [i for s in shared for i in list(s)[number] if not s.is_filler(number)]
        assert together == batch
    assert list(SkipBatchSampler(order, 6, skip_batches=1)) == alone[1:]


def test_norms_and_embeddings_are_not_decayed():
    from model.model_minimind import MiniMindForCausalLM

    model = MiniMindForCausalLM(config(SimpleNamespace(use_moe=1, dropout=0)))
    decayed, kept = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in kept["params"]} == {
        "embed_tokens",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))
