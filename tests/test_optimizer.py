"""Optimizers: which weights Muon takes, that its steps are torch's, and that a bad gradient moves nothing."""

import copy
from types import SimpleNamespace

import pytest
import torch

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.optimizer import MuonWithAdamW, make_optimizer

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 or later")


class Args(SimpleNamespace):
    def __or__(self, changes):
        return Args(**vars(self) | changes)


ARGS = Args(optimizer="muon", learning_rate=1e-2, weight_decay=0.1, device="cpu")


def a_model(**sizes):
    torch.manual_seed(0)
    config = MiniMindConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, **sizes)
    return MiniMindForCausalLM(config)


def names_of(model, optimizer):
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def set_gradients(model, value=None):
    torch.manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if value is None else torch.full_like(p, value)


@needs_muon
def test_muon_takes_the_matrices_and_adamw_the_rest():
    model = a_model(use_moe=True, n_routed_experts=2)
    optimizer = make_optimizer(ARGS, model)
    muon, adamw = (names_of(model, part) for part in optimizer.parts.values())
    assert muon | adamw == {name for name, _ in model.named_parameters()} and not muon & adamw
    assert all(name.endswith("_proj.weight") for name in muon)
    assert "model.embed_tokens.weight" in adamw and "model.layers.0.mlp.gate.weight" in adamw
    assert any(".experts.1.up_proj" in name for name in muon)


@needs_muon
def test_a_step_is_that_of_torchs_two_optimizers():
    model, twin = a_model(), a_model()
    optimizer = make_optimizer(ARGS, model)
    linear = [p for name, p in twin.named_parameters() if name.endswith("_proj.weight")]
    norms = [p for name, p in twin.named_parameters() if "norm" in name]
    how = {"lr": 1e-2, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    muon = torch.optim.Muon(linear, **how)
    adamw = torch.optim.AdamW([*norms, twin.model.embed_tokens.weight], lr=1e-2, weight_decay=0, betas=(0.9, 0.95))
    for _ in range(3):
        for one in (model, twin):
            set_gradients(one)
        optimizer.step(), muon.step(), adamw.step()
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6), name
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-2] * 2


@needs_muon
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was(steps_before):
    """As on CUDA, where nobody waits for the verdict; with a momentum that would move the weights, and without."""
    model = a_model()
    optimizer = make_optimizer(ARGS | {"weight_decay": 0.1 * bool(steps_before)}, model)
    for _ in range(steps_before):
        set_gradients(model)
        optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    momentum = [v.clone() for state in optimizer.parts["muon"].state.values() for v in state.values()]
    set_gradients(model, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    after = [v for state in optimizer.parts["muon"].state.values() for v in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(momentum, after, strict=False))
    set_gradients(model)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before) and all(torch.isfinite(p).all() for p in model.parameters())


@needs_muon
def test_state_goes_around():
    models = [a_model(), a_model()]
    first, second = (make_optimizer(ARGS, model) for model in models)
    set_gradients(models[0])
    first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # as from a file: with tensors of its own
    models[1].load_state_dict(models[0].state_dict())
    for model, optimizer in zip(models, (first, second), strict=True):
        set_gradients(model)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_a_torch_without_muon_is_told(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ValueError, match="--optimizer muon needs torch 2.9 or later, this is "):
        make_optimizer(ARGS, a_model())


@needs_muon
def test_nothing_for_muon_to_do():
    with pytest.raises(ValueError, match="none is trained here"):
        make_optimizer(ARGS, a_model(), params=[torch.nn.Parameter(torch.ones(3))])


def test_adamw_is_the_default_and_fused():
    optimizer = make_optimizer(ARGS | {"optimizer": "adamw"}, a_model())
    assert isinstance(optimizer, torch.optim.AdamW) and not isinstance(optimizer, MuonWithAdamW)
    assert optimizer.defaults["fused"]
