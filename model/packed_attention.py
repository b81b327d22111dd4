"""Causal attention inside the documents of packed rows, at a cost that follows their lengths and not the rows'.

A mask over whole rows would compute every score between two documents only to throw it away. On a CPU the documents
are worked off in tiles of similar length that fit into its cache, faster there than torch's fused kernel; on CUDA in
half precision torch's own variable-length flash attention does it.

    out = document_attention(q, k, v, cu_seqlens, max_length)       # where can_attend(...) says so

Sizes in the comments: S tokens of all rows, N heads, K key/value heads, G = N / K, D head size; n documents of a tile,
L the longest of them.
"""

from __future__ import annotations

import inspect
import re
import zlib
from functools import lru_cache

import torch

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

# remote code loads this file a second time under another name, and an operator may be registered only once
NAMESPACE = f"{re.sub(r'[^0-9A-Za-z_]', '_', __name__)}_{zlib.crc32(__name__.encode())}"
TILE = 1 << 20  # scores of a tile: 2 to 4 MB, so that they stay in the cache between the steps of the softmax
SHORT = 512  # tokens; the queries of longer documents are worked off in blocks, each with the keys up to its end


def can_attend(device_type: str, dtype: torch.dtype, head_dim: int, dropout: float) -> bool:
    """Whether document_attention has a kernel for such queries; elsewhere a mask must do it."""
    if dropout:
        return False
    if device_type == "cuda":
        return has_varlen_flash() and dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0
    return device_type == "cpu"


@lru_cache
def has_varlen_flash() -> bool:
    """Whether torch has variable-length attention (2.10 on) and a GPU that can run it."""
    return varlen_attn is not None and torch.version.cuda is not None and torch.cuda.get_device_capability() >= (8, 0)


@lru_cache
def varlen_arguments() -> frozenset[str]:
    """The names of varlen_attn's arguments: causality and grouped heads are asked for in other ways since 2.12."""
    return frozenset(inspect.signature(varlen_attn).parameters)


def document_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_length: int
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, causal, within each document.

    Args:
        q: [S, N, D]; k, v: [S, K, D], K dividing N: each key head serves N / K neighbouring query heads.
        cu_seqlens: int32 [documents + 1], where each document begins, and S at the end; no document may be left out,
            so padding is one too.
        max_length: no document is longer; a bound will do.

    Returns: [S, N, D].
    """
    if q.device.type == "cpu":
        return _attention(q, k, v, cu_seqlens)
    known, groups = varlen_arguments(), q.size(1) // k.size(1)
    how = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if groups > 1 and "enable_gqa" in known:
        how["enable_gqa"] = True
    elif groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, **how)


# --- the CPU: tiles of documents --------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _tiles(bounds: tuple[int, ...], heads: int) -> tuple[list[tuple[torch.Tensor, torch.Tensor | None]], list]:
    """Short documents in tiles, as (places int64 [n, L], which of them are padding or None), and (start, end) of long.

    A tile's documents are of similar length: those that are shorter than its longest are padded at their end, where
    causality keeps the padding out of sight.
    """
    documents = sorted((end - start, start) for start, end in zip(bounds, bounds[1:], strict=False) if end > start)
    short = [item for item in documents if item[0] <= SHORT]
    long = [(start, start + length) for length, start in documents[len(short) :]]
    tiles = []
    while short:
        longest = short[-1][0]
        count = max(TILE // (heads * longest**2), 1)
        tile = [item for item in short[-count:] if item[0] >= 0.75 * longest]
        del short[-len(tile) :]
        lengths, starts = torch.tensor(tile).unbind(1)
        places = torch.arange(longest)[None] + starts[:, None]  # [n, L]
        padded = torch.arange(longest)[None] >= lengths[:, None]
        # a padding's place is that of its document's last token, as long as nothing is written there
        tiles.append((torch.minimum(places, (starts + lengths - 1)[:, None]), padded if padded.any() else None))
    return tiles, long


def _blocks(start: int, end: int, heads: int) -> list[tuple[int, int]]:
    """(first, last) of a long document's blocks of queries, the last excluded."""
    size = max(TILE // (heads * (end - start)), 16)
    return [(first, min(first + size, end)) for first in range(start, end, size)]


def _causal(queries: int, keys: int, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """[G * queries, keys] of 0 and -inf for the last `queries` of a document's first `keys` tokens."""
    # blocks of long documents come in too many sizes to be kept
    return _kept_causal(queries, groups, dtype) if queries == keys else _new_causal(queries, keys, groups, dtype)


@lru_cache(maxsize=64)
def _kept_causal(length: int, groups: int, dtype: torch.dtype) -> torch.Tensor:
    return _new_causal(length, length, groups, dtype)


def _new_causal(queries: int, keys: int, groups: int, dtype: torch.dtype) -> torch.Tensor:
    allowed = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return torch.zeros(queries, keys, dtype=dtype).masked_fill_(~allowed, -torch.inf).repeat(groups, 1)


def _by_key_head(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[n, L, N, D] -> [n * K, G * L, D]: the query heads of one key head below each other."""
    n, L, N, D = x.shape
    return x.view(n, L, kv_heads, N // kv_heads, D).permute(0, 2, 3, 1, 4).reshape(n * kv_heads, -1, D)


def _by_token(x: torch.Tensor, n: int, heads: int) -> torch.Tensor:
    """[n * K, G * L, D] -> [n, L, N, D]."""
    return x.view(n, heads, -1, x.size(-1)).transpose(1, 2)


def _probabilities(q: torch.Tensor, k: torch.Tensor, queries: int) -> torch.Tensor:
    """q [n * K, G * queries, D], k [n * K, keys, D] -> [n * K, G * queries, keys].

    In bf16 the scores are rounded before the softmax, which then sums in fp32.
    """
    bias = _causal(queries, k.size(1), q.size(1) // queries, q.dtype)
    return torch.baddbmm(bias, q, k.transpose(1, 2), alpha=q.size(-1) ** -0.5).softmax(-1)


def _score_gradient(p: torch.Tensor, grad: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Gradient of the scaled scores by way of the softmax: p * (dp - sum(p * dp))."""
    return torch.ops.aten._softmax_backward_data(grad @ v.transpose(1, 2), p, -1, p.dtype)


@torch.library.custom_op(f"{NAMESPACE}::document_attention", mutates_args=(), device_types="cpu")
def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    heads, kv_heads = q.size(1), k.size(1)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    tiles, long = _tiles(tuple(cu_seqlens.tolist()), heads)
    for places, padded in tiles:
        p = _probabilities(*(_by_key_head(x[places], kv_heads) for x in (q, k)), places.size(1))
        part = _by_token(p @ _by_key_head(v[places], kv_heads), len(places), heads)
        if padded is None:
            out[places] = part
        else:
            out[places[~padded]] = part[~padded]
    for start, end in long:
        for first, last in _blocks(start, end, heads):
            keys, values = (_by_key_head(x[None, start:last], kv_heads) for x in (k, v))
            p = _probabilities(_by_key_head(q[None, first:last], kv_heads), keys, last - first)
            out[first:last] = _by_token(p @ values, 1, heads)[0]
    return out


@torch.library.custom_op(f"{NAMESPACE}::document_attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; the probabilities are worked out again, which is cheaper than keeping them."""
    heads, kv_heads = q.size(1), k.size(1)
    scale = q.size(-1) ** -0.5
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    tiles, long = _tiles(tuple(cu_seqlens.tolist()), heads)
    for places, padded in tiles:
        part = grad[places]
        if padded is not None:
            part[padded] = 0
        queries, keys, values, part = (_by_key_head(x, kv_heads) for x in (q[places], k[places], v[places], part))
        p = _probabilities(queries, keys, places.size(1))
        ds = _score_gradient(p, part, values)
        results = ((dq, (ds @ keys).mul_(scale), heads), (dk, (ds.mT @ queries).mul_(scale), kv_heads))
        for target, result, count in (*results, (dv, p.mT @ part, kv_heads)):
            result = _by_token(result, len(places), count)
            if padded is None:
                target[places] = result
            else:
                target[places[~padded]] = result[~padded]
    for start, end in long:
        for first, last in _blocks(start, end, heads):
            queries, part = (_by_key_head(x[None, first:last], kv_heads) for x in (q, grad))
            keys, values = (_by_key_head(x[None, start:last], kv_heads) for x in (k, v))
            p = _probabilities(queries, keys, last - first)
            ds = _score_gradient(p, part, values)
            dq[first:last] = _by_token((ds @ keys).mul_(scale), 1, heads)[0]
            dk[start:last] += _by_token((ds.mT @ queries).mul_(scale), 1, kv_heads)[0]
            dv[start:last] += _by_token(p.mT @ part, 1, kv_heads)[0]
    return dq, dk, dv


@_attention.register_fake
def _(q, k, v, cu_seqlens):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_attention_backward.register_fake
def _(grad, q, k, v, cu_seqlens):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return *_attention_backward(grad, *ctx.saved_tensors), None


_attention.register_autograd(_backward, setup_context=_setup)
