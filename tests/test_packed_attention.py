"""Attention inside documents: against a naive softmax in fp64, for every shape of document, and under torch.compile."""

import pytest
import torch

from model import packed_attention
from model.packed_attention import can_attend, document_attention


def naive(q, k, v, cu_seqlens):
    """Every document, head and query by itself."""
    out = torch.zeros_like(q)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        for head in range(q.size(1)):
            key_head = head // (q.size(1) // k.size(1))
            for t in range(start, end):
                scores = k[start : t + 1, key_head] @ q[t, head] / q.size(-1) ** 0.5
                out[t, head] = scores.softmax(0) @ v[start : t + 1, key_head]
    return out


def tensors(S, N, K, D=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(S, heads, D, generator=generator, dtype=dtype).requires_grad_() for heads in (N, K, K)]


def bounds(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


DOCUMENTS = {
    "one": [13],
    "equal": [7, 7, 7],
    "single tokens": [1, 1, 1, 5],
    "very different": [1, 24, 3, 9, 2, 17],
    "an empty one": [4, 0, 6],
}


@pytest.mark.parametrize("tile", [1, 200, 1 << 20])  # a tile for each document, some together, all together
@pytest.mark.parametrize("short", [512, 6])  # 6: the longer ones go the way of long documents, in blocks
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
def test_equals_the_naive_loop_with_its_gradients(lengths, heads, short, tile, monkeypatch):
    monkeypatch.setattr(packed_attention, "SHORT", short)
    monkeypatch.setattr(packed_attention, "TILE", tile)
    packed_attention._tiles.cache_clear()
    inputs, cu_seqlens = tensors(sum(lengths), *heads), bounds(*lengths)
    weights = torch.randn(sum(lengths), heads[0], 8, dtype=torch.float64)
    out, expected = document_attention(*inputs, cu_seqlens, 30), naive(*inputs, cu_seqlens)
    assert (out - expected).abs().max() < 1e-12
    found = torch.autograd.grad((out * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    assert max((a - b).abs().max() for a, b in zip(found, wanted, strict=True)) < 1e-12
    packed_attention._tiles.cache_clear()


@pytest.mark.parametrize("length", [300, 700])
def test_long_documents_equal_torchs_own_attention(length):
    inputs = tensors(length + 20, 8, 2, D=64, dtype=torch.float32)
    out = document_attention(*inputs, bounds(length, 20), length)
    for start, end in ((0, length), (length, length + 20)):
        q, k, v = (x[None, start:end].transpose(1, 2) for x in inputs)
        k, v = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
        alone = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert (out[start:end] - alone[0].transpose(0, 1)).abs().max() < 1e-5


def test_bfloat16_is_as_close_as_its_rounding():
    inputs = tensors(200, 4, 2, D=32, dtype=torch.float32)
    cu_seqlens = bounds(60, 90, 50)
    exact = document_attention(*inputs, cu_seqlens, 90)
    out = document_attention(*(x.bfloat16() for x in inputs), cu_seqlens, 90)
    assert out.dtype == torch.bfloat16
    error = (out.float() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert 1e-4 < error < 0.01  # bf16 keeps 8 bits: 0.4 % per rounding


def test_another_document_changes_no_bit():
    """Documents of other content; of other lengths the products are cut differently, which may round differently."""
    lengths = [9, 5, 12]
    inputs = [x.detach().clone() for x in tensors(26, 4, 2, dtype=torch.float32)]
    before = document_attention(*inputs, bounds(*lengths), 12)
    for x in inputs:
        x[9:14] += 1
    after = document_attention(*inputs, bounds(*lengths), 12)
    same = torch.ones(26, dtype=torch.bool)
    same[9:14] = False
    assert torch.equal(before[same], after[same]) and not torch.equal(before[~same], after[~same])


def test_the_operators_are_sound():
    """torch's own check: schema, fake tensors and autograd registration agree with what the operator does."""
    inputs = tensors(20, 4, 2)
    results = torch.library.opcheck(packed_attention._attention, (*inputs, bounds(8, 12)))
    assert len(results) >= 3 and set(results.values()) == {"SUCCESS"}


def test_where_there_is_a_kernel(monkeypatch):
    assert can_attend("cpu", torch.float32, 64, 0.0) and can_attend("cpu", torch.bfloat16, 64, 0.0)
    assert not can_attend("cpu", torch.float32, 64, 0.1)  # dropout on the scores needs the scores
    assert not can_attend("mps", torch.float32, 64, 0.0)
    monkeypatch.setattr(packed_attention, "has_varlen_flash", lambda: True)
    assert can_attend("cuda", torch.bfloat16, 64, 0.0)
    assert not can_attend("cuda", torch.float32, 64, 0.0)  # flash attention is for half precision
    assert not can_attend("cuda", torch.bfloat16, 20, 0.0)
    monkeypatch.setattr(packed_attention, "has_varlen_flash", lambda: False)
    assert not can_attend("cuda", torch.bfloat16, 64, 0.0)


@pytest.mark.parametrize("version", ["2.10", "2.11", "2.12"])
def test_varlen_attention_is_asked_in_the_words_of_each_torch(version, monkeypatch):
    """On the meta device, as there is no GPU: what is asked must be what that version of torch takes."""
    asked = {}
    known = {"2.10": {"is_causal"}, "2.11": {"window_size"}, "2.12": {"window_size", "enable_gqa"}}[version]

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, **how):
        assert set(how) <= known and cu_seq_q is cu_seq_k and (max_q, max_k) == (12, 12)
        asked.update(how, key_heads=k.size(1))
        return torch.empty_like(q)

    monkeypatch.setattr(packed_attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(packed_attention, "varlen_arguments", lambda: frozenset(known))
    q, k, v = (torch.empty(20, heads, 8, device="meta") for heads in (4, 2, 2))
    assert document_attention(q, k, v, torch.empty(3, device="meta"), 12).shape == q.shape
    assert asked.get("is_causal") is True or asked["window_size"] == (-1, 0)
    assert asked["key_heads"] == (2 if asked.get("enable_gqa") else 4)
