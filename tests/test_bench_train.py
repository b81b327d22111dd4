"""The benchmark: its operations by hand, MiniMind's loss equal to ours, and what it prints."""

import json

import numpy as np
import pytest
import torch
from inside import run_inside

from dataset.packing import Collator
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from scripts.bench_train import dense_twin, minimind_loss, multiplied_parameters, operations, our_loss

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def batch_of(*rows):
    """Rows of documents of which all tokens but the first are trained; of the token 5."""
    items = []
    for lengths in rows:
        trained = np.concatenate([np.arange(n) > 0 for n in lengths])
        items.append((np.full(sum(lengths), 5), trained, np.array(lengths)))
    return Collator(10, 0)(items)


@pytest.mark.parametrize("moe", [False, True])
def test_multiplied_parameters_are_those_of_the_blocks_that_a_token_meets(moe):
    config = MiniMindConfig(**SIZES, use_moe=moe, n_routed_experts=5, num_experts_per_tok=2, n_shared_experts=1)
    model = MiniMindForCausalLM(config)
    weights = {name: p.numel() for name, p in model.model.layers.named_parameters() if p.dim() == 2}
    unused = sum(n for name, n in weights.items() if any(f".experts.{e}." in name for e in (2, 3, 4)))
    assert multiplied_parameters(config) == sum(weights.values()) - unused


def test_operations_worked_by_hand():
    config = MiniMindConfig(**SIZES)
    batch = batch_of([3, 4], [10])  # 17 tokens, 2 + 3 + 9 labels, 3 places of padding
    head, attention = 64 * 32, 2 * 6 * 32 * (3**2 + 4**2 + 10**2)
    assert operations(config, batch) == 6 * (multiplied_parameters(config) * 17 + head * 14) + attention


@pytest.mark.parametrize("moe", [False, True])
def test_minimind_way_has_the_same_loss(moe):
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**SIZES, use_moe=moe, aux_loss_alpha=0.0))
    batch = batch_of([7], [10], [2])
    assert minimind_loss(model, batch).item() == pytest.approx(our_loss(model, batch).item(), abs=1e-5)


def test_the_dense_twin_is_as_active_as_the_mixture():
    config = MiniMindConfig(**SIZES, use_moe=True, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1)
    router = 2 * 32 * 4
    assert multiplied_parameters(dense_twin(config)) == multiplied_parameters(config) - router


FLAGS = ["--hidden_size", 32, "--num_hidden_layers", 1, "--num_attention_heads", 4, "--max_seq_len", 128]
FLAGS += ["--batch_size", 2, "--steps", 5, "--use_compile", 0, "--dtype", "float32", "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_compare_prints_one_object_per_line_and_the_ratio_last(stage):
    done = run_inside("scripts/bench_train.py", *FLAGS, "--stage", stage, "--compare", "--json")
    assert done.returncode == 0, done.stderr
    ours, minimind, machine, last = map(json.loads, done.stdout.splitlines())
    assert machine["process_memory_mb"] > 100 and machine["peak_tflops"] > 0
    assert (ours["way"], minimind["way"], last["pairs"]) == ("ours", "minimind", 5)
    assert ours["padding_share"] < 0.05 < minimind["padding_share"]
    assert last["lowest"] <= last["ratio"] <= last["highest"] and ours["compiled"] == minimind["compiled"] == 0
    for way in (ours, minimind):
        assert way["positions_per_second"] * (1 - way["padding_share"]) == pytest.approx(
            way["tokens_per_second"], rel=0.01
        )
        assert 0 < way["share_of_peak"] < 1 and way["ms_per_step"] > 0


@pytest.mark.slow
def test_a_mixture_against_its_dense_twin():
    done = run_inside("scripts/bench_train.py", *FLAGS, "--use_moe", 1, "--dense_twin")
    assert done.returncode == 0 and "dense  ratio " in done.stdout, done.stderr
    refused = run_inside("scripts/bench_train.py", *FLAGS, "--dense_twin")
    assert refused.returncode == 2 and "pass --preset moe" in refused.stderr
