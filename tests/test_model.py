"""The network against independent references: stock classes, MiniMind's own numbers, naive loops, hand-worked sums.

MINIMIND_FILES=folder adds the comparison with weights and logits that MiniMind itself wrote.

    python -m pytest tests/test_model.py
"""

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from conftest import ROOT
from model.model_minimind import (
    LinearCrossEntropy,
    MiniMindConfig,
    MiniMindForCausalLM,
    attention_bias,
    rope_frequencies,
)
from model.presets import PRESETS, V3, V3_MOE
from model.weights import load_model

V = 101
KINDS = {
    "v2": {},
    "v3": {**V3, "num_key_value_heads": 2, "head_dim": 24},
    "v2-moe": {"use_moe": True},
    "v3-moe": {**V3, **V3_MOE, "num_key_value_heads": 2, "head_dim": 24},
}
DENSE = ["v2", "v3"]


def tiny(kind="v2", **changes):
    """A small random model in eval mode, spread wide enough that a wrong sum shows, norms and biases away from 1."""
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    fields |= {"vocab_size": V, "initializer_range": 0.08, **KINDS[kind], **changes}
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def random_ids(rows, tokens, seed=1):
    return torch.randint(3, V, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(actual, expected, tolerance=1e-5):
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture(autouse=True)
def no_gradients(request):
    """Inference tests run without autograd; those that need it ask by the marker `grad`."""
    with torch.set_grad_enabled("grad" in request.fixturenames):
        yield


@pytest.fixture
def grad():
    """Asks for autograd."""


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, total, active",
    [
        ("small", 25_829_888, 25_829_888),
        ("base", 104_030_976, 104_030_976),
        # 8 layers, each with 2 idle experts of 3 matrices of 640 x 1728
        ("moe", 145_029_760, 145_029_760 - 8 * 2 * 3 * 640 * 1728),
        ("minimind3", 63_912_192, 63_912_192),
        ("minimind3_moe", 198_416_640, 63_936_768),
    ],
)
def test_parameter_counts_of_presets(preset, total, active):
    from trainer.trainer_utils import count_parameters

    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig(**PRESETS[preset]))
    assert count_parameters(model) == (total, active)


def test_default_is_the_small_preset_and_all_presets_are_tested():
    assert MiniMindConfig().to_dict() == MiniMindConfig(**PRESETS["small"]).to_dict()
    assert set(PRESETS) == {"tiny", "small", "base", "moe", "minimind3", "minimind3_moe"}
    with torch.device("meta"):
        count = sum(p.numel() for p in MiniMindForCausalLM(MiniMindConfig(**PRESETS["tiny"])).parameters())
    assert 3e6 < count < 6e6


def test_defaults_of_both_generations():
    """What no parameter count shows."""
    default = MiniMindConfig()
    assert (default.rms_norm_eps, default.rope_theta, default.vocab_size) == (1e-5, 1e6, 6400)
    assert (default.pad_token_id, default.bos_token_id, default.eos_token_id) == (0, 1, 2)
    assert (default.num_attention_heads, default.num_key_value_heads, default.head_dim) == (8, 2, 64)
    assert (default.num_experts_per_tok, default.norm_topk_prob, default.aux_loss_alpha) == (2, True, 0.01)
    assert not MiniMindConfig(num_experts_per_tok=1).norm_topk_prob  # v2 never scales a lone weight
    v3 = MiniMindConfig(**PRESETS["minimind3_moe"])
    assert (v3.rms_norm_eps, v3.num_key_value_heads, v3.head_dim, v3.qk_norm) == (1e-6, 4, 96, True)
    assert (v3.num_experts_per_tok, v3.norm_topk_prob, v3.aux_loss_alpha, v3.seq_aux) == (1, True, 5e-4, False)


def test_config_refuses_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="65.*8.*head_dim"):
        MiniMindConfig(hidden_size=65)
    with pytest.raises(ValueError, match="8.*3"):
        MiniMindConfig(num_key_value_heads=3)


# --- stock architectures ----------------------------------------------------------------------------------------------


def stock_config(model, architecture):
    """config.json of the stock class, each field in the spelling of transformers 4 and of 5."""
    c = model.config
    rope = {"rope_type": "default"}
    if c.inference_rope_scaling:
        rope = {"rope_type": "yarn", **c.yarn}
    config = {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": {
            "Llama": "llama",
            "Qwen3": "qwen3",
            "Qwen2Moe": "qwen2_moe",
            "Qwen3Moe": "qwen3_moe",
        }[architecture],
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": c.rms_norm_eps,
        "max_position_embeddings": c.max_position_embeddings,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "rope_theta": c.rope_theta,
        "rope_scaling": rope if c.inference_rope_scaling else None,
        "rope_parameters": {**rope, "rope_theta": c.rope_theta},
        "torch_dtype": "float32",
        "dtype": "float32",
    }
    if c.use_moe:
        config |= {
            "num_experts": c.n_routed_experts,
            "num_local_experts": c.n_routed_experts,
            "num_experts_per_tok": c.num_experts_per_tok,
            "moe_intermediate_size": c.moe_intermediate_size,
            "shared_expert_intermediate_size": c.moe_intermediate_size * c.n_shared_experts,
            "norm_topk_prob": c.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config


def stock_weights(model):
    """The tensors under stock names: shared experts become one, whose gate stands at sigmoid(0) = 1/2."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "shared_experts" not in name and name != "lm_head.weight":
            tensors[name] = tensor.contiguous()
    c = model.config
    for i in range(c.num_hidden_layers if c.n_shared_experts and c.use_moe else 0):
        block, layer = f"model.layers.{i}.", model.model.layers[i]
        shared = layer.mlp.shared_experts
        tensors[block + "mlp.shared_expert_gate.weight"] = torch.zeros(1, c.hidden_size)
        tensors[block + "mlp.shared_expert.gate_proj.weight"] = torch.cat([e.gate_proj.weight for e in shared])
        tensors[block + "mlp.shared_expert.up_proj.weight"] = torch.cat([e.up_proj.weight for e in shared])
        tensors[block + "mlp.shared_expert.down_proj.weight"] = 2 * torch.cat([e.down_proj.weight for e in shared], 1)
        for name in "qkv":
            width = getattr(layer.self_attn, f"{name}_proj").weight.size(0)
            tensors[block + f"self_attn.{name}_proj.bias"] = torch.zeros(width)
    return tensors


def stock_model(model, architecture, folder):
    (folder / "config.json").write_text(json.dumps(stock_config(model, architecture)), encoding="utf-8")
    save_file(stock_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    stock, info = AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(stock).__name__ == f"{architecture}ForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return stock.eval()


@pytest.mark.parametrize(
    "kind, changes, architecture",
    [
        ("v2", {}, "Llama"),
        ("v2", {"inference_rope_scaling": True}, "Llama"),
        ("v3", {}, "Qwen3"),
        ("v3", {"inference_rope_scaling": True}, "Qwen3"),
        ("v2-moe", {"n_shared_experts": 1}, "Qwen2Moe"),
        ("v2-moe", {"n_shared_experts": 2}, "Qwen2Moe"),
        ("v2-moe", {"num_experts_per_tok": 1}, "Qwen2Moe"),
        ("v3-moe", {}, "Qwen3Moe"),
        ("v3-moe", {"num_experts_per_tok": 2}, "Qwen3Moe"),
    ],
)
def test_logits_equal_stock_class(kind, changes, architecture, tmp_path):
    model = tiny(kind, **changes)
    stock = stock_model(model, architecture, tmp_path)
    ids = random_ids(2, 40)
    logits = model(ids).logits
    assert 0.3 < logits.std() < 30
    assert_close(logits, stock(ids).logits)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    assert_close(model(ids, attention_mask=mask).logits[0, 7:], stock(ids, attention_mask=mask).logits[0, 7:])


@pytest.mark.parametrize("file", ["v2/64", "v2/64_moe", "v3/64", "v3/64_moe"])
def test_logits_equal_those_of_minimind(file):
    if not os.environ.get("MINIMIND_FILES"):
        pytest.skip("MINIMIND_FILES does not name the folder with weights and logits that MiniMind wrote")
    generation, size = file.split("/")
    folder = Path(os.environ["MINIMIND_FILES"]) / generation
    reference = torch.load(folder / f"reference_{size}.pt", weights_only=True)
    told = []
    model = load_model(folder / f"full_sft_{size}.pth", say=told.append)
    assert f"MiniMind {generation}" in told[0] and "--tokenizer_path" in told[0]
    assert_close(model(reference["input_ids"]).logits, reference["logits"])


# --- rotary positions -------------------------------------------------------------------------------------------------


def test_yarn_frequencies_worked_by_hand():
    config = MiniMindConfig(hidden_size=64, num_attention_heads=4, rope_theta=10000.0)  # 16 dimensions, 8 pairs
    plain = rope_frequencies(config, torch.device("cpu"))
    assert plain.tolist() == pytest.approx([10 ** (-i / 2) for i in range(8)], rel=1e-6)
    config.inference_rope_scaling = True
    # turns over 2048 positions: pair i makes 2048 / (2 pi 10^(i/2)); 32 turns at i = 2.01, 1 turn at i = 5.03
    # so pairs up to 2 stay, pairs from 6 on are slowed 16 times, in between (i - 2) / 4 of the way
    factors = [1, 1, 1, 0.75 + 0.25 / 16, 0.5 + 0.5 / 16, 0.25 + 0.75 / 16, 1 / 16, 1 / 16]
    expected = [f * p for f, p in zip(factors, plain.tolist(), strict=True)]
    assert rope_frequencies(config, torch.device("cpu")).tolist() == pytest.approx(expected, rel=1e-5)


def test_positions_count_only_relatively():
    model, ids = tiny(), random_ids(1, 12)
    positions = torch.arange(12)[None]
    plain = model(ids, position_ids=positions).logits
    assert_close(model(ids, position_ids=positions + 500).logits, plain, 5e-5)
    assert (model(ids, position_ids=positions * 2).logits - plain).abs().max() > 0.01


# --- cache ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [[1] * 17, [6, 11], [1, 8, 8], [16, 1], [5, 1, 1, 7, 3]])
def test_cached_pieces_equal_one_pass(kind, pieces):
    model, ids = tiny(kind), random_ids(2, 17)
    cache, logits = DynamicCache(), []
    for piece in ids.split(pieces, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert cache.get_seq_length() == 17
    assert_close(torch.cat(logits, 1), model(ids).logits)


@pytest.mark.parametrize("pieces", [[9, 8], [3, 1, 13]])
def test_cached_pieces_of_padded_rows(pieces):
    model, ids = tiny("v3"), random_ids(2, 17)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, logits, end = DynamicCache(), [], 0
    for piece, place in zip(ids.split(pieces, dim=1), positions.split(pieces, dim=1), strict=True):
        end += piece.size(1)
        output = model(piece, attention_mask=mask[:, :end], position_ids=place, past_key_values=cache, use_cache=True)
        logits.append(output.logits)
    logits = torch.cat(logits, 1)
    assert_close(logits[0, 4:], model(ids[:1, 4:]).logits[0])
    assert_close(logits[1], model(ids[1:]).logits[0])


def naive_greedy(model, ids, count):
    """Greedy decoding without cache: the whole row again for each token."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_equals_naive_loop(kind, cache):
    model, ids = tiny(kind), random_ids(2, 7)
    expected = naive_greedy(model, ids, 12)
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), **GREEDY, **({"cache_implementation": cache} if cache else {})
    )
    assert generated.tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["v2", "v3-moe"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_left_padded_batch_equals_rows_alone(kind, cache):
    model = tiny(kind)
    rows = [random_ids(1, length, seed=length) for length in (9, 4, 1)]
    batch = torch.cat([F.pad(row, (9 - row.size(1), 0)) for row in rows])
    mask = torch.stack([(torch.arange(9) >= 9 - row.size(1)).long() for row in rows])
    generated = model.generate(
        batch, attention_mask=mask, **GREEDY, **({"cache_implementation": cache} if cache else {})
    )
    for row, output in zip(rows, generated, strict=True):
        assert output[9:].tolist() == naive_greedy(model, row, 12)[0, row.size(1) :].tolist()


def test_beam_search_finds_at_least_the_greedy_score():
    model, ids = tiny("v3"), random_ids(2, 5)
    options = {**GREEDY, "attention_mask": torch.ones_like(ids)}

    def score(rows):
        logps = model(rows).logits.log_softmax(-1)[:, 4:-1]
        return logps.gather(2, rows[:, 5:, None]).sum((1, 2))

    beams = model.generate(ids, num_beams=4, **options)
    assert beams.shape == (2, 17)
    assert (score(beams) >= score(model.generate(ids, **options)) - 1e-4).all()


def test_continuing_a_conversation_with_its_cache():
    model, ids = tiny(), random_ids(1, 5)
    first = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([first.sequences, random_ids(1, 6, seed=9)], 1)
    options = {"attention_mask": torch.ones_like(longer), **GREEDY}
    resumed = model.generate(longer, past_key_values=first.past_key_values, **options)
    assert resumed.tolist() == naive_greedy(model, longer, 12).tolist()


# --- padding ----------------------------------------------------------------------------------------------------------


def padded(ids, left, right):
    """(ids, mask) with garbage where nothing should look."""
    fill = random_ids(ids.size(0), left + right, seed=5)
    mask = torch.ones_like(ids)
    return torch.cat([fill[:, :left], ids, fill[:, left:]], 1), F.pad(mask, (left, right))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left, right", [(5, 0), (0, 6), (3, 4)])
def test_padding_changes_nothing(kind, left, right):
    model, ids = tiny(kind), random_ids(2, 11)
    row, mask = padded(ids, left, right)
    plain = model(ids).logits
    assert_close(model(row, attention_mask=mask).logits[:, left : left + 11], plain)
    assert_close(model(row, attention_mask=mask.bool()).logits[:, left : left + 11], plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_row_of_padding_only_gives_finite_numbers(kind, dtype):
    model, ids = tiny(kind).to(dtype), random_ids(3, 9)
    mask = torch.ones_like(ids)
    mask[0], mask[1, :5] = 0, 0
    logits = model(ids, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    assert torch.isfinite(model.generate(ids, attention_mask=mask, **GREEDY)).all()


def test_attention_bias_worked_by_hand():
    device = torch.device("cpu")
    assert attention_bias(None, None, 4, 0, 4, device) is None
    assert attention_bias(None, None, 1, 6, 7, device) is None
    # two queries after a cache of two, of which the first is padding
    bias = attention_bias(torch.tensor([[0, 1, 1, 1]]), None, 2, 2, 4, device)
    assert bias.int().tolist() == [[[[0, 1, 1, 0], [0, 1, 1, 1]]]]
    # documents 1 1 2 and padding 0, which sees itself
    bias = attention_bias(None, torch.tensor([[1, 1, 2, 0]]), 4, 0, 4, device)
    assert bias[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    # a row of padding only: each place sees itself
    bias = attention_bias(torch.zeros(1, 3), None, 3, 0, 3, device)
    assert bias[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    # a static cache of five places, one filled: the empty ones stay hidden
    bias = attention_bias(None, None, 2, torch.tensor(1), 5, device)
    assert bias[0, 0].int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]


# --- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DENSE)
def test_half_precision_padded_and_cached_near_plain(kind, dtype, autocast):
    model, ids = tiny(kind, num_hidden_layers=4), random_ids(2, 19)
    exact = model(ids).logits
    if not autocast:
        model.to(dtype)
    with torch.autocast("cpu", dtype=dtype) if autocast else contextlib.nullcontext():
        plain = model(ids).logits.float()
        row, mask = padded(ids, 5, 3)
        results = [model(row, attention_mask=mask).logits[:, 5:24]]
        cache = DynamicCache()
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([8, 1, 1, 9], 1)]
        results.append(torch.cat(parts, 1))
    assert (plain - exact).abs().max() > 1e-4  # it is half precision
    for logits in results:
        assert ((logits.float() - plain).pow(2).mean().sqrt() / plain.std()).item() < 0.02


@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["v2-moe", "v3-moe"])
def test_half_precision_mixture_is_finite(kind, dtype, autocast, grad):
    model, ids = tiny(kind), random_ids(2, 19)
    if not autocast:
        model.to(dtype)
    row, mask = padded(ids, 5, 0)
    labels = row.masked_fill(mask == 0, -100)
    with torch.autocast("cpu", dtype=dtype) if autocast else contextlib.nullcontext():
        output = model(row, attention_mask=mask, labels=labels)
        for layer in model.model.layers:  # the path that other devices take
            layer.mlp.dispatch = layer.mlp.run_all
        other = model(row, attention_mask=mask, labels=labels)
    output.loss.backward()
    assert torch.isfinite(output.logits).all() and torch.isfinite(other.logits).all()
    assert output.loss.item() == pytest.approx(other.loss.item(), rel=0.02)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_residual_stream_stays_fp32_under_autocast(kind):
    model, seen = tiny(kind), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output[0].dtype)))
    linear = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, args, out: linear.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(random_ids(1, 5))
    assert seen == [(torch.float32, torch.float32)] * 2 and linear == [torch.bfloat16]


# --- packed documents -------------------------------------------------------------------------------------------------


def packed(lengths, padding=3, seed=1):
    """One row: ids, positions that start anew, document numbers from 1, 0 for padding."""
    ids = random_ids(1, sum(lengths) + padding, seed)
    positions = torch.cat([*(torch.arange(n) for n in lengths), torch.zeros(padding, dtype=torch.long)])[None]
    numbers = torch.tensor([i + 1 for i, n in enumerate(lengths) for _ in range(n)] + [0] * padding)[None]
    return ids, positions, numbers


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_documents_alone(kind):
    model, (ids, positions, numbers) = tiny(kind), packed([5, 9, 1, 7])
    logits = model(ids, position_ids=positions, document_ids=numbers).logits
    for number in range(1, 5):
        here = numbers[0] == number
        assert_close(logits[0, here], model(ids[:, here]).logits[0])


@pytest.mark.parametrize("kind", DENSE)
def test_one_document_leaves_the_others_untouched_bit_for_bit(kind):
    model, (ids, positions, numbers) = tiny(kind), packed([5, 9, 7])
    changed = torch.where(numbers == 2, random_ids(1, ids.size(1), seed=8), ids)
    before = model(ids, position_ids=positions, document_ids=numbers).logits
    after = model(changed, position_ids=positions, document_ids=numbers).logits
    assert torch.equal(before[numbers != 2], after[numbers != 2])
    assert not torch.equal(before[numbers == 2], after[numbers == 2])


def test_future_tokens_leave_the_past_untouched_bit_for_bit():
    model, ids = tiny(), random_ids(1, 12)
    changed = ids.clone()
    changed[:, 8:] = random_ids(1, 4, seed=8)
    assert torch.equal(model(ids).logits[:, :8], model(changed).logits[:, :8])


class ScoreFinder(TorchFunctionMode):
    """Notes each floating result that is as large as attention scores, and each call of the fused attention."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.scores, self.fused = tokens, [], []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is F.scaled_dot_product_attention:
            self.fused.append(kwargs)
        elif isinstance(result, torch.Tensor) and result.is_floating_point() and result.dim() >= 2:
            if tuple(result.shape[-2:]) == (self.tokens, self.tokens):
                self.scores.append(function)
        return result


@pytest.mark.parametrize("mask", ["none", "right", "left", "documents"])
def test_attention_is_fused_with_and_without_masks(mask):
    model, ids = tiny("v3"), random_ids(2, 23)
    arguments = {}
    if mask in ("left", "right"):
        arguments["attention_mask"] = torch.ones_like(ids)
        arguments["attention_mask"][0, :4] = 0
        if mask == "right":
            arguments["attention_mask"] = arguments["attention_mask"].flip(1)
    elif mask == "documents":
        arguments["document_ids"] = (torch.arange(23) > 9).long().expand(2, -1) + 1
    with ScoreFinder(23) as finder:
        model(ids, **arguments)
        torch.ones(23, 1) @ torch.ones(1, 23)  # the finder finds
    assert len(finder.scores) == 1 and len(finder.fused) == 2
    for call in finder.fused:
        assert call["is_causal"] is (mask == "none")
        assert mask == "none" or call["attn_mask"].dtype == torch.bool


# --- mixture of experts -----------------------------------------------------------------------------------------------

MIXTURES = {
    "v2 top-2, shared": ("v2-moe", {}),
    "v2 top-1, weights as they are": ("v2-moe", {"num_experts_per_tok": 1, "n_shared_experts": 0}),
    "v3 top-1": ("v3-moe", {}),
    "v3 top-3 of 5": ("v3-moe", {"num_experts_per_tok": 3, "n_routed_experts": 5}),
}


def naive_mixture(moe, x):
    """What a mixture is by definition, token by token."""
    rows = []
    for token in x.flatten(0, 1):
        scores = (moe.gate.weight @ token).softmax(0)
        best = sorted(range(len(scores)), key=lambda e: -scores[e].item())[: moe.top_k]
        weights = torch.stack([scores[e] for e in best])
        if moe.top_k > 1 and moe.normalise:
            weights = weights / weights.sum()
        elif moe.normalise:
            weights = torch.ones(1)
        out = sum(w * moe.experts[e](token) for w, e in zip(weights, best, strict=True))
        rows.append(out + sum(shared(token) for shared in moe.shared_experts))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("path", ["dispatch", "run_grouped", "run_all"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixture_equals_token_by_token_loop(mixture, path, grad):
    kind, changes = MIXTURES[mixture]
    moe = tiny(kind, **changes).model.layers[0].mlp
    moe.dispatch = getattr(moe, path)
    torch.manual_seed(2)
    x, direction = torch.randn(2, 13, 64, requires_grad=True), torch.randn(2, 13, 64)
    results = []
    for run in (lambda: moe(x, torch.ones(2, 13), torch.arange(26) // 13)[0], lambda: naive_mixture(moe, x)):
        moe.zero_grad()
        x.grad = None
        out = run()
        (out * direction).sum().backward()
        grads = [p.grad for name, p in moe.named_parameters() if "gate.weight" != name]
        results.append([out, x.grad, *grads, moe.gate.weight.grad])
    if mixture == "v3 top-1":  # the loop's constant 1 hides the router; ours gives it a gradient on purpose
        router, hidden = results[0].pop(), results[0].pop(1)
        results[1].pop(), results[1].pop(1)
        assert router.abs().max() > 1e-3 and torch.isfinite(hidden).all()
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, torch.zeros_like(actual) if expected is None else expected, 2e-5)


@pytest.mark.parametrize("kind, k", [("v2-moe", 1), ("v2-moe", 2), ("v3-moe", 1), ("v3-moe", 2)])
def test_loss_alone_trains_the_router(kind, k, grad):
    model, ids = tiny(kind, num_experts_per_tok=k, aux_loss_alpha=0.0), random_ids(2, 15)
    output = model(ids, labels=ids)
    assert output.aux_loss.item() == 0
    output.loss.backward()
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad.abs().max() > 1e-4


def test_gradient_of_a_lone_weight_is_that_of_its_logarithm(grad):
    """Output of weight exactly 1, gradient as of p / constant p: d log p, the way that makes a good expert likelier."""
    moe = tiny("v3-moe").model.layers[0].mlp
    x = torch.randn(1, 1, 64)
    out, _ = moe(x, torch.ones(1, 1), torch.zeros(1, dtype=torch.long))
    scores = moe.gate(x[0])
    best = scores.argmax().item()
    assert torch.equal(out[0], moe.experts[best](x[0]))
    direction = torch.randn(64)
    (expected,) = torch.autograd.grad(
        scores[0, best].log() * (direction @ out[0, 0]).detach(), moe.gate.weight, retain_graph=True
    )
    (actual,) = torch.autograd.grad(direction @ out[0, 0], moe.gate.weight)
    assert_close(actual, expected)


def test_router_stays_fp32_under_autocast():
    router, x = tiny("v2-moe").model.layers[0].mlp.gate, torch.randn(50, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = router(x.bfloat16())
    assert_close(scores, (x.bfloat16().float() @ router.weight.T).softmax(-1), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_training_mode_gives_the_same_output(kind):
    model, ids = tiny(kind), random_ids(2, 15)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = model.eval()(ids, attention_mask=mask)
    output = model.train()(ids, attention_mask=mask)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.aux_loss, expected.aux_loss)


def balance(model, scores, chosen, weights):
    rows = torch.arange(len(chosen)) // len(weights[0])
    return (
        model.model.layers[0]
        .mlp.balance_loss(torch.tensor(scores), torch.tensor(chosen)[:, None], torch.tensor(weights), rows)
        .item()
    )


def test_balance_loss_worked_by_hand():
    # two experts, two rows of two tokens; row 1 chooses 0 0, row 2 chooses 0 1
    scores = [[0.9, 0.1], [0.7, 0.3], [0.6, 0.4], [0.2, 0.8]]
    chosen, real = [0, 0, 0, 1], [[1.0, 1.0], [1.0, 1.0]]
    sizes = {"n_routed_experts": 2, "num_experts_per_tok": 1, "aux_loss_alpha": 0.5}
    # per row: 2 * (1 * 0.8 + 0 * 0.2) = 1.6 and 2 * (0.5 * 0.4 + 0.5 * 0.6) = 1.0; mean 1.3
    assert balance(tiny("v2-moe", seq_aux=True, **sizes), scores, chosen, real) == pytest.approx(0.5 * 1.3)
    # over the batch: 2 * (0.75 * 0.6 + 0.25 * 0.4) = 1.1
    assert balance(tiny("v2-moe", seq_aux=False, **sizes), scores, chosen, real) == pytest.approx(0.5 * 1.1)
    # the second token of row 2 is padding: rows weigh 2 and 1, row 2 is 2 * (1 * 0.6) = 1.2
    real = [[1.0, 1.0], [1.0, 0.0]]
    by_row, by_batch = (2 * 1.6 + 1 * 1.2) / 3, 2 * (3 / 3 * (0.9 + 0.7 + 0.6) / 3)
    assert balance(tiny("v2-moe", seq_aux=True, **sizes), scores, chosen, real) == pytest.approx(0.5 * by_row)
    assert balance(tiny("v2-moe", seq_aux=False, **sizes), scores, chosen, real) == pytest.approx(0.5 * by_batch)
    # nothing but padding
    assert balance(tiny("v2-moe", **sizes), scores, chosen, [[0.0, 0.0], [0.0, 0.0]]) == 0


@pytest.mark.parametrize("seq_aux", [True, False])
def test_balance_loss_is_alpha_per_layer_when_uniform_and_more_when_not(seq_aux, grad):
    model = tiny("v2-moe", seq_aux=seq_aux, aux_loss_alpha=0.25)
    moe = model.model.layers[0].mlp
    scores = torch.full((8, 4), 0.25, requires_grad=True)
    chosen = torch.tensor([[0, 1], [2, 3]] * 4)
    rows = torch.arange(8) // 4
    loss = moe.balance_loss(scores, chosen, torch.ones(2, 4), rows)
    assert loss.item() == pytest.approx(0.25)
    skewed = torch.softmax(torch.arange(4.0), 0).expand(8, 4)
    assert moe.balance_loss(skewed, skewed.topk(2).indices, torch.ones(2, 4), rows) > 0.3
    output = model(random_ids(2, 9))
    assert output.aux_loss >= 2 * 0.25 * 0.9
    output.aux_loss.backward()
    assert all(layer.mlp.gate.weight.grad.abs().max() > 0 for layer in model.model.layers)


@pytest.mark.parametrize("seq_aux", [True, False])
def test_balance_loss_ignores_padding(seq_aux):
    model, ids = tiny("v2-moe", seq_aux=seq_aux), random_ids(2, 9)
    expected = model(ids).aux_loss
    for left, right in ((4, 0), (0, 4)):
        row, mask = padded(ids, left, right)
        assert_close(model(row, attention_mask=mask).aux_loss, expected, 1e-7)
    numbers = F.pad(torch.ones_like(ids), (0, 4))
    row, _ = padded(ids, 0, 4)
    assert_close(model(row, document_ids=numbers).aux_loss, expected, 1e-7)
    labels = F.pad(ids, (0, 4), value=-100)
    assert_close(model(row, document_ids=numbers, labels=labels).aux_loss, model(ids, labels=ids).aux_loss, 1e-7)


@pytest.mark.parametrize("path", ["dispatch", "run_grouped", "run_all"])
def test_expert_without_tokens_has_a_zero_gradient(path, grad):
    model = tiny("v3-moe", num_hidden_layers=1)
    moe = model.model.layers[0].mlp
    moe.dispatch = getattr(moe, path)
    ids = random_ids(1, 1)
    model(torch.cat([ids, ids], 1), labels=torch.cat([ids, ids], 1)).loss.backward()
    used = [expert.up_proj.weight.grad.abs().max().item() > 0 for expert in moe.experts]
    assert any(used) and not all(used)  # None would have raised


def test_no_step_waits_for_the_device(monkeypatch, grad):
    """Meta tensors have shapes and no values: whatever must look at values raises."""
    # autocast does not know this device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    with torch.device("meta"):
        for kind in KINDS:
            model = tiny(kind).train()
            ids = torch.zeros(2, 9, dtype=torch.long)
            output = model(ids, attention_mask=torch.ones_like(ids), labels=ids)
            assert output.loss.device.type == "meta" and output.logits.shape == (2, 9, V)
            output.loss.backward()
        with pytest.raises(NotImplementedError):  # what the CPU may do
            model.model.layers[0].mlp.dispatch(torch.ones(3, 64), torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.long))


# --- loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 511, 512, 513, 1100])
def test_linear_cross_entropy_equals_full_logits(tokens, grad):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 16, requires_grad=True)
    weight = torch.randn(V, 16, requires_grad=True)
    targets = torch.randint(0, V, (tokens,))
    targets[::3] = -100
    actual = LinearCrossEntropy.apply(hidden, weight, targets)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    pairs = zip(
        torch.autograd.grad(actual * 0.3, [hidden, weight]),
        torch.autograd.grad(expected * 0.3, [hidden, weight]),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 2.0**16)])
def test_linear_cross_entropy_under_autocast(dtype, scale, grad):
    torch.manual_seed(0)
    hidden = (torch.randn(600, 16) / 4).to(dtype).requires_grad_()
    weight = torch.randn(V, 16, requires_grad=True)
    targets = torch.randint(0, V, (600,))
    with torch.autocast("cpu", dtype=dtype):
        actual = LinearCrossEntropy.apply(hidden, weight, targets)
    exact = F.cross_entropy(hidden.float() @ weight.T, targets, reduction="sum")
    assert actual.dtype == torch.float32 and actual.item() == pytest.approx(exact.item(), rel=1e-3)
    # a gradient scaler multiplies by 65536, which fp16 cannot hold, the product with a mean's gradient it can
    ours = torch.autograd.grad(actual * scale, [hidden, weight])
    theirs = torch.autograd.grad(exact, [hidden, weight])
    assert [g.dtype for g in ours] == [dtype, torch.float32]
    for mine, reference in zip(ours, theirs, strict=True):
        mine, reference = mine.float() / scale, reference.float()
        held = mine.isfinite() & (reference.abs() * scale < 6e4)
        assert held.float().mean() > (0.2 if scale > 1 else 0.999)
        assert ((mine - reference)[held].norm() / reference[held].norm()).item() < 0.02


def test_linear_cross_entropy_works_out_only_the_gradients_that_are_asked_for(grad):
    hidden, weight, targets = torch.randn(7, 16), torch.randn(V, 16), torch.randint(0, V, (7,))

    def saved(**wanted):
        h, w = hidden.clone().requires_grad_("h" in wanted), weight.clone().requires_grad_("w" in wanted)
        loss = LinearCrossEntropy.apply(h, w, targets)
        if loss.requires_grad:
            loss.backward()
        return h.grad is not None, w.grad is not None

    assert saved(h=1, w=1) == (True, True)
    assert saved(h=1) == (True, False)
    assert saved(w=1) == (False, True)
    assert saved() == (False, False)


def test_validation_costs_no_gradients(monkeypatch):
    model, ids = tiny(), random_ids(2, 9)
    calls = []
    monkeypatch.setattr(torch.Tensor, "scatter_add_", lambda self, *args: calls.append(args) or self)
    assert torch.isfinite(model(ids, labels=ids).loss) and not calls
    with torch.enable_grad():
        model(ids, labels=ids)
    assert len(calls) == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("tokens", [1, 513, 1100])
def test_smoothed_cross_entropy_is_that_of_torch(tokens, smoothing, grad):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 16, requires_grad=True)
    weight = (torch.randn(V, 16) / 4).requires_grad_()
    targets = torch.randint(0, V, (tokens,))
    targets[1::3] = -100
    actual = LinearCrossEntropy.apply(hidden, weight, targets, smoothing)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum", label_smoothing=smoothing)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(loss / tokens, [hidden, weight]) for loss in (actual, expected))
    for mine, reference in zip(ours, theirs, strict=True):
        assert_close(mine, reference, 1e-5)


def test_no_smoothing_is_not_a_bit_different(grad):
    torch.manual_seed(0)
    hidden, weight = torch.randn(600, 16, requires_grad=True), torch.randn(V, 16, requires_grad=True)
    targets = torch.randint(0, V, (600,))
    plain, none = (LinearCrossEntropy.apply(hidden, weight, targets, *more) for more in ((), (0.0,)))
    assert torch.equal(plain, none)
    for a, b in zip(*(torch.autograd.grad(loss, [hidden, weight]) for loss in (plain, none)), strict=True):
        assert torch.equal(a, b)
    logps = torch.log_softmax(hidden @ weight.T, -1)  # as it was worked out before there was any
    before = torch.zeros(())
    for part in (slice(0, 512), slice(512, 600)):
        before -= logps[part].gather(1, targets[part, None]).sum()
    assert torch.equal(plain, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("return_logits", [True, False])
def test_labels_are_smoothed_in_training_only(kind, return_logits, grad):
    model, ids = tiny(kind), random_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    plain = model(ids, labels=labels)
    model.label_smoothing = 0.1
    assert torch.equal(model(ids, labels=labels).loss_sum, plain.loss_sum)  # eval mode
    output = model.train()(ids, labels=labels, return_logits=return_logits)
    logits, targets = plain.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1)
    assert output.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.loss_sum.item() != pytest.approx(plain.loss_sum.item(), rel=1e-4)
    assert output.tokens == plain.tokens and output.loss.item() == pytest.approx(
        (expected / output.tokens + plain.aux_loss).item(), rel=1e-5
    )
    expected = expected / output.tokens + plain.aux_loss
    ours = torch.autograd.grad(output.loss, list(model.parameters()))
    for mine, theirs in zip(ours, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        assert_close(mine, theirs, 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_follows_the_hugging_face_convention(kind, grad):
    model, ids = tiny(kind), random_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    output = model(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert output.tokens.item() == 5 + 8
    assert output.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx((output.loss_sum / 13 + output.aux_loss).item(), rel=1e-6)
    assert output[0] is output.loss and output["loss"] is output.loss and output[1] is output.logits
    assert (output.aux_loss > 0) == model.config.use_moe
    expected = expected / 13 + output.aux_loss
    ours = torch.autograd.grad(output.loss, list(model.parameters()), retain_graph=True)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        assert_close(mine, theirs, 2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 6])
def test_no_label_at_all_gives_zero_loss_and_finite_gradients(kind, tokens, grad):
    model, ids = tiny(kind), random_ids(2, tokens)
    output = model(ids, labels=torch.full_like(ids, -100))
    assert output.loss.item() == 0 and output.tokens.item() == 0
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(kind, reentrant, grad):
    model, ids = tiny(kind).train(), random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *args: calls.append(1))
    output = model(ids, labels=ids, use_cache=True)
    assert output.past_key_values is None
    output.loss.backward()
    assert len(calls) == 2  # forward, and once more in backward
    for name, value in gradients(model).items():
        assert_close(value, expected[name], 1e-6)


# --- fields and arguments ---------------------------------------------------------------------------------------------


def test_dropout_acts_in_training_only(grad):
    model, ids = tiny("v2-moe", dropout=0.3), random_ids(2, 9)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    output = model(ids, labels=ids)
    assert not torch.equal(output.logits, model(ids).logits)
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_mlp_gate_and_activation_are_what_they_say():
    x = torch.randn(5, 64)
    mlp = tiny(mlp_gate=True, hidden_act="gelu").model.layers[0].mlp
    plain = mlp.down_proj(F.gelu(mlp.gate_proj(x)) * mlp.up_proj(x))
    assert_close(mlp(x), plain * torch.sigmoid(mlp.output_gate(x)))
    assert torch.isfinite(tiny("v3-moe", mlp_gate=True, hidden_act="relu")(random_ids(1, 5)).logits).all()


def test_config_from_before_a_field_was_added_means_the_same():
    model, ids = tiny("v3"), random_ids(1, 9)
    old = model.config.to_dict()
    for field in ("mlp_gate", "hidden_act", "yarn", "inference_rope_scaling", "norm_topk_prob", "seq_aux", "dropout"):
        del old[field]
    older = MiniMindForCausalLM(MiniMindConfig.from_dict(old)).eval()
    older.load_state_dict(model.state_dict())
    assert torch.equal(older(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_to_keep_hidden_states_and_embeddings(kind):
    model, ids = tiny(kind), random_ids(2, 9)
    plain = model(ids)
    assert plain.loss is None and plain.hidden_states is None and "hidden_states" not in plain
    assert_close(model(ids, logits_to_keep=3).logits, plain.logits[:, -3:])
    assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, plain.logits[:, [0, 4]])
    output = model(ids, labels=ids, return_logits=False)
    assert output.logits is None and output.loss.item() == model(ids, labels=ids).loss.item()
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, plain.logits)
    states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == 3 and torch.equal(states[0], model.model.embed_tokens(ids))
    assert_close(model.lm_head(states[-1]), plain.logits)


# --- save and load ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"inference_rope_scaling": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_save_pretrained_round_trip(kind, changes, tmp_path):
    model, ids = tiny(kind, rope_theta=5e5, **changes), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    loaded, info = MiniMindForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    half = MiniMindForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    assert half.dtype == torch.bfloat16
    assert torch.equal(half(ids).logits, model.bfloat16()(ids).logits)


def test_fresh_weights_are_spread_as_configured():
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**{**PRESETS["tiny"], "use_moe": True}, initializer_range=0.03))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert parameter.std().item() == pytest.approx(0.03, rel=0.1), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_auto_class_when_registered(tmp_path):
    AutoConfig.register("minimind", MiniMindConfig, exist_ok=True)
    AutoModelForCausalLM.register(MiniMindConfig, MiniMindForCausalLM, exist_ok=True)
    model, ids = tiny("v3"), random_ids(1, 9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.float32).eval()
    assert type(loaded) is MiniMindForCausalLM and torch.equal(loaded(ids).logits, model(ids).logits)


EXPORT = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
MiniMindConfig.register_for_auto_class()
MiniMindForCausalLM.register_for_auto_class("AutoModelForCausalLM")
torch.manual_seed(0)
model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, use_moe=True))
model.save_pretrained(sys.argv[1])
torch.save(model.eval()(torch.arange(9)[None]).logits, sys.argv[1] + "/logits.pt")
"""
IMPORT = """
import sys, torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32).eval()
assert "model.model_minimind" not in sys.modules
expected = torch.load(folder + "/logits.pt", weights_only=True)
assert (model(torch.arange(9)[None]).logits - expected).abs().max() < 1e-5
model.generate(torch.arange(9)[None], attention_mask=torch.ones(1, 9), max_new_tokens=3, do_sample=False)
print("loaded", type(model).__module__)
"""


@pytest.mark.slow
def test_remote_code_in_a_clean_process_offline(tmp_path):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    for code in (EXPORT, IMPORT):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "My-模型 1"), str(ROOT)],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    assert "loaded transformers_modules" in done.stdout


def test_loss_of_a_fresh_model_is_that_of_guessing():
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**{**PRESETS["tiny"], "vocab_size": V}))
    ids = random_ids(4, 30)
    assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(V), abs=0.3)


def test_resizing_the_vocabulary_keeps_the_weights_tied():
    model, ids = tiny(), random_ids(1, 9)
    plain = model(ids).logits
    model.resize_token_embeddings(V + 7)
    assert model.config.vocab_size == V + 7 and model.lm_head.weight is model.model.embed_tokens.weight
    assert_close(model(ids).logits[..., :V], plain)


def test_logits_of_the_loss_are_never_more_than_a_chunk():
    """On a GPU 64 MB of them in fp32, whatever the vocabulary; on a CPU what fits its cache."""
    for vocab_size in (6400, 32_000, 151_936):
        size = LinearCrossEntropy.chunk("cuda", vocab_size)
        assert size == 512 or size * vocab_size <= 1 << 24
    assert LinearCrossEntropy.chunk("cpu", 6400) == 512 and 2000 < LinearCrossEntropy.chunk("cuda", 6400) < 8192
