"""The estimate against the tensors that torch really keeps, and the lines that are said of memory and disk."""

import os
import sys
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model.model_minimind import LinearCrossEntropy, MiniMindConfig, MiniMindForCausalLM
from model.presets import PRESETS
from trainer import memory
from trainer.memory import activations, advice, describe, disk_needed, disk_warning, estimate, is_out_of_memory, warning
from trainer.optimizer import make_optimizer

ROWS, TOKENS = 3, 50


def arguments(**changes):
    fields = {"device": "cpu", "dtype": "float32", "batch_size": ROWS, "max_seq_len": TOKENS, "packing": 1}
    fields |= {"gradient_checkpointing": 0, "optimizer": "adamw", "accumulation_steps": 1, "oom_policy": "raise"}
    fields |= {"save_dtype": "float32", "keep_checkpoints": 2, "val_path": None, "val_ratio": 0.0}
    return SimpleNamespace(**fields | changes)


def a_config(preset, **changes):
    return MiniMindConfig(**{**PRESETS[preset], "num_hidden_layers": 2, **changes})


class Kept:
    """Bytes of the storages that autograd keeps inside, each counted once, the model's own weights not at all."""

    def __init__(self, model):
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.kept = []  # the tensors, so that no storage is freed and its place taken by another

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.kept.append(tensor)
        return tensor

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    @property
    def bytes(self):
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept)


def measured(config, args):
    """What the network keeps for its backward pass; with checkpointing, and what one layer keeps once it runs again."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config).train()
    half = nullcontext() if args.dtype == "float32" else torch.autocast("cpu", dtype=getattr(torch, args.dtype))
    ids = torch.randint(3, 6400, (args.batch_size, args.max_seq_len))
    positions = torch.arange(args.max_seq_len).repeat(args.batch_size, 1)
    bounds = torch.arange(0, ids.numel() + 1, args.max_seq_len, dtype=torch.int32)
    batch = {"position_ids": positions, "cu_seqlens": bounds} if args.packing else {}
    once = Kept(model)
    if args.gradient_checkpointing:
        layer, inputs = model.model.layers[0], []
        layer.register_forward_pre_hook(lambda module, received: inputs.append(received))
        with torch.no_grad(), half:
            model.model(ids, **batch)
        again = Kept(model)
        again.pack(inputs[0][0])  # kept as the layer's input anyhow
        with again.hooks(), half:
            layer(inputs[0][0].requires_grad_(), *inputs[0][1:])
        layer_bytes = again.bytes - inputs[0][0].nbytes
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with once.hooks(), half:
        model.model(ids, **batch)
    return once.bytes + (layer_bytes if args.gradient_checkpointing else 0)


# --- the estimate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", ["tiny", "small", "moe"])
def test_activations_are_what_autograd_keeps(preset, dtype, checkpointing):
    config, args = a_config(preset), arguments(dtype=dtype, gradient_checkpointing=checkpointing)
    assert activations(config, args) == pytest.approx(measured(config, args), rel=0.05)


@pytest.mark.parametrize(
    "changes",
    [{"qk_norm": True}, {"mlp_gate": True}, {"use_moe": True, "n_shared_experts": 0, "num_experts_per_tok": 1}],
    ids=str,
)
@pytest.mark.parametrize("packing", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_of_other_networks(changes, packing, dtype):
    config, args = a_config("tiny", **changes), arguments(dtype=dtype, packing=packing)
    assert activations(config, args) == pytest.approx(measured(config, args), rel=0.03)


def test_a_mixture_that_runs_all_experts_on_all_tokens_keeps_that(monkeypatch):
    """The way of a GPU without a grouped product, run here."""
    config, args = a_config("moe", hidden_size=128), arguments()
    dispatched = measured(config, args)
    monkeypatch.setattr("model.model_minimind.MoE.way", lambda self, flat: self.run_all)
    monkeypatch.setattr(memory, "_runs_all_experts", lambda *of: True)
    real = measured(config, args)
    assert activations(config, args) == pytest.approx(real, rel=0.03) and real > 1.3 * dispatched


def test_weights_gradients_and_moments_are_counted():
    config = a_config("tiny", hidden_size=64)
    model = MiniMindForCausalLM(config)
    model(torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    moments = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.dim())
    found = estimate(config, arguments(), parameters, parameters)
    assert found["weights"] == found["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert found["optimizer"] == moments
    assert found["total"] == sum(size for name, size in found.items() if name != "total")
    frozen = estimate(config, arguments(), 1000, parameters)
    assert (frozen["weights"], frozen["gradients"], frozen["optimizer"]) == (4 * parameters, 4000, 8000)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 or later")
def test_muon_keeps_one_moment_of_matrices():
    config = a_config("tiny", hidden_size=64)
    model = MiniMindForCausalLM(config)
    args = arguments(optimizer="muon", learning_rate=1e-3, weight_decay=0.1, param_groups=[])
    optimizer = make_optimizer(args, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    states = [state for part in optimizer.parts.values() for state in part.state.values()]
    moments = sum(v.nbytes for state in states for v in state.values() if isinstance(v, torch.Tensor) and v.dim())
    parameters = sum(p.numel() for p in model.parameters())
    assert estimate(config, args, parameters, parameters)["optimizer"] == pytest.approx(moments, rel=0.01)


def test_the_loss_keeps_a_gradient_and_a_chunk_of_logits():
    """By hand: what the function keeps, and beside it the largest tensors of a chunk."""
    config, tokens = a_config("tiny"), 2000
    hidden = torch.randn(tokens, config.hidden_size, requires_grad=True)
    weight = torch.randn(config.vocab_size, config.hidden_size, requires_grad=True)
    kept = Kept(torch.nn.Linear(1, 1))
    with kept.hooks():
        LinearCrossEntropy.apply(hidden, weight, torch.zeros(tokens, dtype=torch.long))
    chunk = 512 * config.vocab_size * (4 + 4)  # logits and their logarithms' probabilities, fp32
    expected = hidden.nbytes + kept.bytes + chunk + weight.nbytes
    found = estimate(config, arguments(batch_size=20, max_seq_len=100), weight.numel(), weight.numel())
    assert found["logits"] == expected


def test_more_of_everything_needs_more():
    config = a_config("small")
    total = estimate(config, arguments(), 10**6, 10**6)["total"]
    for changes in ({"batch_size": 2 * ROWS}, {"max_seq_len": 2 * TOKENS}, {"packing": 0}):
        assert estimate(config, arguments(**changes), 10**6, 10**6)["total"] > total
    wide = arguments(batch_size=64)
    for changes in ({"dtype": "bfloat16"}, {"gradient_checkpointing": 1}):
        saving = arguments(**{"batch_size": 64} | changes)
        assert activations(config, saving) < 0.75 * activations(config, wide)


# --- what is said -----------------------------------------------------------------------------------------------------

PARTS = {"weights": 10**8, "gradients": 10**8, "optimizer": 2 * 10**8, "activations": 15 * 10**8, "logits": 4 * 10**6}
PARTS |= {"total": sum(PARTS.values())}


def test_the_line_names_the_parts_and_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 23 * 10**9)
    assert describe(PARTS, "cpu") == (
        "memory: about 1.9 GB (weights 0.10, gradients 0.10, optimizer 0.20, activations 1.5, logits 0.0040), "
        "23 GB are free here"
    )
    assert warning(PARTS, "cpu") is None
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    assert describe(PARTS, "cpu").endswith("logits 0.0040)") and warning(PARTS, "cpu") is None


def test_a_warning_where_it_does_not_fit(monkeypatch):
    """1.904 GB, 0.1 of which are there already."""
    monkeypatch.setattr(memory, "free_memory", lambda device: 1_804_000_000)
    assert warning(PARTS, "cpu") is None
    monkeypatch.setattr(memory, "free_memory", lambda device: 1_803_999_999)
    assert warning(PARTS, "cpu") == "warning: about 1.8 GB more will be needed and 1.8 GB are free"


def test_free_memory_is_that_of_the_machine(tmp_path, monkeypatch):
    text = "MemTotal:       8000 kB\nMemFree:        100 kB\nMemAvailable:   5000 kB\n"
    (tmp_path / "meminfo").write_text(text, encoding="utf-8")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    assert memory.free_memory("cpu") == 5000 * 1024
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "psutil", None)  # cannot be imported
    assert memory.free_memory("cpu") is None
    psutil = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=77))
    monkeypatch.setitem(sys.modules, "psutil", psutil)
    assert memory.free_memory("mps") == 77


def test_advice_names_what_would_still_help(monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    assert advice(arguments(device="cuda:0", batch_size=32, accumulation_steps=2, max_seq_len=512)) == (
        "to save memory: --batch_size 16 --accumulation_steps 4 (the same result); "
        "--oom_policy shrink (does that by itself); "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment (against gaps); --dtype bfloat16; "
        "--gradient_checkpointing 1 (a third more time); --max_seq_len below 512, or a smaller --preset"
    )
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    spent = {"batch_size": 1, "oom_policy": "shrink", "dtype": "bfloat16", "gradient_checkpointing": 1}
    assert advice(arguments(device="cuda:0", **spent)) == (
        f"to save memory: --max_seq_len below {TOKENS}, or a smaller --preset"
    )
    on_cpu = advice(arguments())
    assert "shrink" not in on_cpu and "CUDA" not in on_cpu
    assert "--batch_size 1 --accumulation_steps 3 " in on_cpu  # 3 rows in pieces of 1


def test_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(real.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB)."))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as shapes:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(shapes.value)
    assert not is_out_of_memory(ValueError("MPS backend out of memory"))


# --- disk -------------------------------------------------------------------------------------------------------------


def test_disk_needed_is_the_size_of_the_files(tmp_path):
    model = MiniMindForCausalLM(a_config("tiny"))
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "resume.pth")
    weights, state = (os.path.getsize(tmp_path / f"{name}.pth") for name in ("weights", "resume"))
    assert disk_needed(parameters, arguments()) == pytest.approx(2 * weights + 3 * state, rel=0.02)
    best = arguments(keep_checkpoints=5, val_ratio=0.1, save_dtype="float16")
    assert disk_needed(parameters, best) == pytest.approx(3 * weights / 2 + 6 * state, rel=0.02)


def test_disk_warning_names_the_folder_that_is_full(tmp_path, monkeypatch):
    args = arguments(save_dir=tmp_path / "out" / "new", checkpoint_dir=tmp_path / "state")
    assert disk_warning(1000, args) is None
    usage = namedtuple("usage", "total used free")
    free = {"bytes": disk_needed(10**7, args)}
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, free["bytes"] if Path(path).exists() else None))
    assert disk_warning(10**7, args) is None
    free["bytes"] -= 1  # 2 * 0.04 of weights and 3 * 0.12 of states
    assert f"take up to 0.44 GB and {tmp_path} has 0.44 GB left" in disk_warning(10**7, args)
