"""Optimizers: what is frozen, grouped or taken by Muon, that steps are torch's, that a bad gradient moves nothing."""

import copy
from types import SimpleNamespace

import pytest
import torch

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.optimizer import Group, MuonWithAdamW, freeze, make_optimizer, parameter_groups, parse_groups

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 or later")


class Args(SimpleNamespace):
    def __or__(self, changes):
        return Args(**vars(self) | changes)


ARGS = Args(optimizer="muon", learning_rate=1e-2, weight_decay=0.1, device="cpu", param_groups=[])
ADAMW = ARGS | {"optimizer": "adamw"}


def a_model(layers=1, **sizes):
    torch.manual_seed(0)
    config = MiniMindConfig(vocab_size=64, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, **sizes)
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
    optimizer = make_optimizer(ADAMW, a_model())
    assert isinstance(optimizer, torch.optim.AdamW) and not isinstance(optimizer, MuonWithAdamW)
    assert optimizer.defaults["fused"]


# --- freezing ---------------------------------------------------------------------------------------------------------


def train(model, optimizer, steps=3):
    """Steps on the loss of random tokens, two documents to the row, as packed training has them."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        ids = torch.randint(3, 64, (2, 12), generator=generator)
        bounds = torch.tensor([0, 5, 12, 24], dtype=torch.int32)
        output = model(ids, labels=ids, cu_seqlens=bounds, return_logits=False)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return output


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def has_state(model, optimizer):
    parts = optimizer.parts.values() if isinstance(optimizer, MuonWithAdamW) else [optimizer]
    kept = {id(p) for part in parts for p in part.state}
    return {name for name, p in model.named_parameters() if id(p) in kept}


FROZEN = [
    ["model.embed_tokens.*"],
    ["lm_head.*"],  # the same weight by its other name
    ["model.embed_tokens.*", "*.layers.0.*", "model.norm.*"],  # all but the last layer
    ["*norm*"],
    ["*_proj.*", "*.gate.*"],
    ["*.k_proj.*", "*.v_proj.*"],
    ["*.q_proj.*"],
    ["*.experts.*", "*.gate_proj.*"],
    ["*.mlp.gate.*", "*.o_proj.*"],
    ["*[!m].weight", "*embed*", "*.layers.*"],  # all but the last norm
]


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("patterns", FROZEN, ids=lambda patterns: patterns[0])
@pytest.mark.parametrize("kind", ["adamw", pytest.param("muon", marks=needs_muon)])
def test_what_is_frozen_keeps_its_bits_and_all_else_moves_as_it_would(kind, patterns, moe):
    sizes = {"num_key_value_heads": 2, "use_moe": moe, "n_routed_experts": 2, "qk_norm": True}
    model = a_model(layers=2, **sizes)
    if not moe:
        patterns = [p for p in patterns if ".experts." not in p and p not in ("*.gate.*", "*.mlp.gate.*")]
    before = snapshot(model)
    frozen = freeze(model, patterns)
    assert set(frozen) == {name for name, p in model.named_parameters() if not p.requires_grad} and frozen
    left = [name for name, p in model.named_parameters() if p.requires_grad]
    matrix = any(name.endswith("_proj.weight") for name in left)
    optimizer = make_optimizer(ARGS if kind == "muon" and matrix else ADAMW, model)
    model.train()
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(3))
    gradients_equal_those_of_the_whole(model, ids, left)
    train(model, optimizer)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name in frozen), name
    assert has_state(model, optimizer) == set(left)


def gradients_equal_those_of_the_whole(model, ids, names):
    """What is trained has the gradient that it has with nothing frozen; what is frozen has none."""
    whole = copy.deepcopy(model).requires_grad_(True)
    bounds = torch.tensor([0, 5, 12, 24], dtype=torch.int32)
    for one in (model, whole):
        one(ids, labels=ids, cu_seqlens=bounds, return_logits=False).loss.backward()
    for (name, p), (_, q) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert (p.grad is not None) == (name in names), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_goes_with_frozen_embeddings(reentrant):
    model = a_model(layers=2)
    freeze(model, ["model.embed_tokens.*", "*.layers.0.*"])
    model.train()
    ids = torch.randint(3, 64, (2, 12))
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in expected), name
        assert p.grad is None or torch.allclose(p.grad, expected[name], atol=1e-6), name


def test_an_untied_output_layer_is_frozen_by_itself():
    model = a_model(tie_word_embeddings=False)
    assert freeze(model, ["lm_head.*"]) == ["lm_head.weight"]
    tied = a_model()
    assert freeze(tied, ["lm_head.*"]) == freeze(a_model(), ["*embed*"]) == ["model.embed_tokens.weight"]
    assert freeze(tied, []) == []


def test_freezing_says_what_it_cannot():
    model = a_model()
    with pytest.raises(ValueError, match=r"--freeze 'layers.\*' fits no parameter: .* model.embed_tokens.weight, "):
        freeze(model, ["*embed*", "layers.*"])
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze(model, ["*embed*", "*.layers.*", "model.norm.*"])
    assert all(p.requires_grad for p in model.parameters())  # as it was


# --- groups -----------------------------------------------------------------------------------------------------------


def test_groups_are_read():
    assert parse_groups([]) == []
    assert parse_groups(["*.mlp.*=0.5", "*norm*=2,0", "a=b=1e-1,0.3"]) == [
        Group("*.mlp.*", 0.5),
        Group("*norm*", 2.0, 0.0),
        Group("a=b", 0.1, 0.3),
    ]
    for wrong in ("*.mlp.*", "=1", "a=", "a=x", "a=1,2,3", "a=-1", "a=1,-2", "a=nan", "a=inf", "a=1,"):
        with pytest.raises(ValueError, match=r"is not PATTERN=RATE\[,DECAY\]: write it as"):
            parse_groups([wrong])
    with pytest.raises(ValueError, match="has the rate 0: what shall stay goes to --freeze 'a'"):
        parse_groups(["a=0"])


def test_without_patterns_there_are_the_two_groups_in_the_models_order():
    model = a_model(use_moe=True)
    named = list(model.named_parameters())
    decayed = [p for name, p in named if "norm" not in name and "embed" not in name]
    kept = [p for name, p in named if "norm" in name or "embed" in name]
    groups = parameter_groups(model, 0.1)
    assert [list(map(id, group["params"])) for group in groups] == [list(map(id, decayed)), list(map(id, kept))]
    assert [set(group) for group in groups] == [{"params", "weight_decay"}] * 2
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_the_first_pattern_that_fits_takes_a_parameter():
    model = a_model()
    groups = parameter_groups(model, 0.1, parse_groups(["*.mlp.up*=0.5", "*.mlp.*=0.25,0.3", "lm_head.*=2"]), 1e-2)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [
        ([names[id(p)].removeprefix("model.layers.0.") for p in g["params"]], g["weight_decay"], g.get("lr"))
        for g in groups
    ]
    attention = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight"]
    assert found == [
        (attention, 0.1, None),
        (norms, 0.0, None),
        (["mlp.up_proj.weight"], 0.1, 5e-3),
        (["mlp.gate_proj.weight", "mlp.down_proj.weight"], 0.3, 2.5e-3),
        (["model.embed_tokens.weight"], 0.0, 2e-2),
    ]


def test_a_decay_that_is_stated_holds_for_norms_too():
    groups = parameter_groups(a_model(), 0.1, parse_groups(["*.layers.*=1,0.2"]), 1e-2)
    assert [len(group["params"]) for group in groups] == [0, 2, 7, 2]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.2, 0.2]
    make_optimizer(ADAMW | {"param_groups": ["*=0.5"]}, a_model())  # nothing left for the first two


def test_a_pattern_without_effect_is_told():
    model = a_model()
    with pytest.raises(ValueError, match="--param_groups 'mlp' fits no parameter: their names are model.embed"):
        parameter_groups(model, 0.1, parse_groups(["mlp=1"]), 1e-2)
    with pytest.raises(ValueError, match=r"--param_groups '\*.mlp.\*' has no effect"):
        parameter_groups(model, 0.1, parse_groups(["*.layers.*=1", "*.mlp.*=2"]), 1e-2)
    freeze(model, ["*.mlp.*"])
    with pytest.raises(ValueError, match="has no effect: what it fits is frozen"):
        parameter_groups(model, 0.1, parse_groups(["*.mlp.*=2"]), 1e-2)
    with pytest.raises(ValueError, match="this stage has parameter groups of its own"):
        make_optimizer(ADAMW | {"param_groups": ["*=2"]}, model, params=list(model.parameters()))


def test_the_first_step_is_the_rate_times_the_factor():
    """By hand: AdamW's first moves each weight by lr * sign(gradient), and pulls lr * decay of it back to 0."""
    model = a_model()
    before = snapshot(model)
    optimizer = make_optimizer(ADAMW | {"param_groups": ["*.mlp.*=0.5", "*.q_proj.*=3,0.2"]}, model)
    set_gradients(model)
    for p in model.parameters():
        p.grad.sign_()  # far above AdamW's epsilon
    optimizer.step()
    for name, p in model.named_parameters():
        rate = 1e-2 * (0.5 if ".mlp." in name else 3 if ".q_proj." in name else 1)
        decay = 0.2 if ".q_proj." in name else 0.1 if p.dim() > 1 and "embed" not in name else 0.0
        expected = before[name] * (1 - rate * decay) - rate * p.grad
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-6)
    assert sorted({group["initial_lr"] for group in optimizer.param_groups}) == pytest.approx([0.005, 0.01, 0.03])


@needs_muon
def test_muon_goes_by_the_groups():
    patterns = {"param_groups": ["*.layers.*=0.5"]}
    ours, theirs = a_model(), a_model()
    grouped, slower = make_optimizer(ARGS | patterns, ours), make_optimizer(ARGS | {"learning_rate": 5e-3}, theirs)
    for model, optimizer in ((ours, grouped), (theirs, slower)):
        set_gradients(model)
        optimizer.step()
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(p, q) == (".layers." in name), name
    assert [group["initial_lr"] for group in grouped.param_groups] == [5e-3, 1e-2, 5e-3]  # Muon, then AdamW twice
