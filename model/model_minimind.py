"""MiniMind: a decoder-only transformer in one file, dense or mixture of experts, for both generations of its weights.

The network is a Hugging Face `PreTrainedModel`, so `generate`, `save_pretrained` and remote-code loading work on
transformers 4.51 to 5.x; this file imports nothing but torch, transformers and the file beside it that remote-code
export copies with it.

    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=512, num_hidden_layers=8))

Sizes in the comments: B rows, T tokens, H hidden size, N heads, K key/value heads, D head size, V vocabulary,
E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.utils import ModelOutput

from .packed_attention import can_attend, document_attention


class MiniMindConfig(PretrainedConfig):
    """Everything that shapes the network. The defaults are MiniMind's second generation ("v2"), 25,829,888 parameters.

    The third generation ("v3") is `qk_norm=True` with other widths; `model/presets.py` names both. Fields that an old
    config.json lacks take their defaults, under which nothing changes.

    Args:
        intermediate_size: width of the MLP; None means 8/3 of hidden_size, rounded up to a multiple of 64.
        head_dim: size of one head; None means hidden_size / num_attention_heads.
        qk_norm: RMSNorm on each head's query and key, before the rotation.
        mlp_gate: one more gate, `x * sigmoid(W x)`, on what the MLP puts out.
        inference_rope_scaling: stretch RoPE by YaRN (https://arxiv.org/abs/2309.00071), with the numbers of `yarn`.
        yarn: {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"}.
            (Not called rope_scaling: transformers 5 rewrites a field of that name.)
        n_routed_experts, num_experts_per_tok, n_shared_experts, moe_intermediate_size: the mixture of experts.
        norm_topk_prob: whether the chosen experts' weights are scaled to sum to 1; None means "if more than one".
        aux_loss_alpha: weight of the load-balancing loss; seq_aux: balance within each row (v2), not over the batch.
    """

    model_type = "minimind"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        hidden_size: int = 512,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 2,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        vocab_size: int = 6400,
        hidden_act: str = "silu",
        mlp_gate: bool = False,
        qk_norm: bool = False,
        dropout: float = 0.0,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        max_position_embeddings: int = 32768,
        rope_theta: float = 1e6,
        inference_rope_scaling: bool = False,
        yarn: dict | None = None,
        use_moe: bool = False,
        n_routed_experts: int = 4,
        num_experts_per_tok: int = 2,
        n_shared_experts: int = 1,
        moe_intermediate_size: int | None = None,
        norm_topk_prob: bool | None = None,
        aux_loss_alpha: float = 0.01,
        seq_aux: bool = True,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        pad_token_id: int = 0,
        tie_word_embeddings: bool = True,
        **kwargs,
    ):
        if hidden_size % num_attention_heads and head_dim is None:
            raise ValueError(
                f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_attention_heads}: "
                "change one of them, or give head_dim"
            )
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {num_attention_heads} is no multiple of num_key_value_heads {num_key_value_heads}"
            )
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size or 64 * math.ceil(int(hidden_size * 8 / 3) / 64)
        self.vocab_size = vocab_size
        self.hidden_act = hidden_act
        self.mlp_gate = mlp_gate
        self.qk_norm = qk_norm
        self.dropout = dropout
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.inference_rope_scaling = inference_rope_scaling
        self.yarn = {
            "factor": 16.0,
            "original_max_position_embeddings": 2048,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "attention_factor": 1.0,
            **(yarn or {}),
        }
        self.use_moe = bool(use_moe)
        self.n_routed_experts = n_routed_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.n_shared_experts = n_shared_experts
        self.moe_intermediate_size = moe_intermediate_size or self.intermediate_size
        self.norm_topk_prob = num_experts_per_tok > 1 if norm_topk_prob is None else norm_topk_prob
        self.aux_loss_alpha = aux_loss_alpha
        self.seq_aux = seq_aux
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )


@dataclass
class MiniMindOutput(ModelOutput):
    """What a forward pass gives back.

    Args:
        loss: scalar, mean cross-entropy over the labelled tokens plus aux_loss; only when labels are given.
        logits: [B, T or the last logits_to_keep, V]; None when `return_logits=False`.
        past_key_values: the filled cache, when use_cache.
        hidden_states: tuple of [B, T, H], embeddings first, normed output last; when output_hidden_states.
        loss_sum: scalar fp32, summed cross-entropy in nats; tokens: scalar int64, how many labels it sums over.
        aux_loss: scalar fp32, the mixture's load-balancing loss, already weighted; 0 for a dense model.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    loss_sum: torch.FloatTensor | None = None
    tokens: torch.LongTensor | None = None
    aux_loss: torch.FloatTensor | None = None


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T`, a few hundred tokens at a time.

    The logits of a whole batch would be the largest tensor of a training step by far. Here each chunk's logits become
    its gradient at once and are dropped, so they stay in the cache of a CPU and out of the memory of a GPU. The method
    is Liger Kernel's fused linear cross-entropy (https://arxiv.org/abs/2410.10989, section 3.2), in plain torch.
    """

    CHUNK = 512  # tokens at a time on a CPU, whose cache they fit
    GPU_LOGITS = 1 << 24  # at a time elsewhere: enough to keep a GPU busy, 64 MB in fp32

    @staticmethod
    def chunk(device: str, vocab_size: int) -> int:
        """Tokens whose logits are worked out together."""
        small = LinearCrossEntropy.CHUNK
        return small if device == "cpu" else max(LinearCrossEntropy.GPU_LOGITS // vocab_size, small)

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0
    ) -> torch.Tensor:
        """hidden [S, H], weight [V, H], targets [S] int64 with -100 for "no loss here" -> scalar fp32, in nats.

        smoothing: share of the target that is spread evenly over the vocabulary (https://arxiv.org/abs/1512.00567,
        section 7).
        """
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        loss_sum = torch.zeros((), device=hidden.device, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        with torch.autocast(device, enabled=False):
            w = weight.to(dtype)
            size = LinearCrossEntropy.chunk(device, len(weight))
            for start in range(0, len(hidden), size):
                part = slice(start, start + size)
                h, target = hidden[part].to(dtype), targets[part]
                valid = (target != -100)[:, None]
                target = target.clamp(min=0)[:, None]
                logps = torch.log_softmax(h @ w.T, dim=-1, dtype=torch.promote_types(dtype, torch.float32))  # [C, V]
                expected = logps.gather(1, target)  # under the target's distribution, of log p
                if smoothing:
                    expected = (1 - smoothing) * expected + smoothing * logps.mean(1, keepdim=True)
                loss_sum -= (expected * valid).sum()
                if grad_hidden is None and grad_weight is None:
                    continue
                grad = logps.exp_()  # d loss / d logits = softmax - target's distribution
                grad.scatter_add_(1, target, torch.full_like(grad[:, :1], smoothing - 1.0))
                if smoothing:
                    grad -= smoothing / len(weight)
                grad = grad.mul_(valid).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = grad @ w
                if grad_weight is not None:  # (a LoRA run freezes it)
                    grad_weight += grad.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss_sum

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:  # by way of fp32: a gradient scaler's 65536 alone is infinite in fp16
            grad_hidden = (grad_hidden.float() * grad_output).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_output).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        out = self.weight * normed.type_as(x)
        if torch.is_autocast_enabled(x.device.type):  # once here instead of once in every linear layer that reads it
            out = out.to(torch.get_autocast_dtype(x.device.type))
        return out


def rope_frequencies(config: MiniMindConfig, device: torch.device) -> torch.Tensor:
    """Rotation speed of each pair of a head's dimensions, [D/2], fp32, radians per position; YaRN applied if asked.

    Computed anew in each forward instead of kept in a buffer: transformers 5 builds models on the meta device and fills
    non-persistent buffers with whatever memory holds.
    """
    dim = config.head_dim
    inv_freq = config.rope_theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    if not config.inference_rope_scaling:
        return inv_freq

    yarn = config.yarn

    def pair_that_turns(rotations: float) -> float:
        """The pair of dimensions that makes this many full turns over the original context."""
        original = yarn["original_max_position_embeddings"]
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair_that_turns(yarn["beta_slow"])), dim // 2 - 1)
    pairs = torch.arange(dim // 2, device=device, dtype=torch.float32)
    ramp = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)  # 0: fast pairs, kept; 1: slow pairs, interpolated
    return inv_freq * (1 - ramp + ramp / yarn["factor"])


def rope_tables(config: MiniMindConfig, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for each position and dimension: [B, T] -> two of [B, T, 1, D], fp32."""
    angles = position_ids[:, :, None, None].float() * rope_frequencies(config, position_ids.device)
    angles = torch.cat([angles, angles], dim=-1)
    scale = config.yarn["attention_factor"] if config.inference_rope_scaling else 1.0
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + D/2]) by its angle (https://arxiv.org/abs/2104.09864); x: [B, T, N, D]."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).type_as(x)


def attention_bias(attention_mask, document_ids, query_len: int, past_len, key_len: int, device) -> torch.Tensor | None:
    """Which key each query may see: bool [B or 1, 1, T, key_len], or None where plain causal attention says it all.

    A query sees the keys up to its own place in the cache, that are no padding, and of its own document. It always sees
    itself, so that a row of pure padding gives finite numbers instead of NaN.

    Args:
        attention_mask: None, [B, key_len] with 1 for real tokens, or a ready [B, 1, T, key_len] mask of `generate`.
        document_ids: None or [B, T], equal within a document.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask[..., :key_len]
    # (the length of a static cache is a tensor, and its free places are keys that must not be seen)
    nothing_hidden = query_len == key_len or (query_len == 1 and isinstance(past_len, int) and key_len == past_len + 1)
    if attention_mask is None and document_ids is None and nothing_hidden:
        return None
    queries = torch.arange(query_len, device=device)[:, None] + past_len  # [T, 1]
    keys = torch.arange(key_len, device=device)[None, :]
    allowed = (keys <= queries)[None, None]  # [1, 1, T, key_len]
    if attention_mask is not None:
        padded = F.pad(attention_mask.bool(), (0, key_len - attention_mask.size(1)))
        allowed = allowed & padded[:, None, None, :]
    if document_ids is not None:
        allowed = allowed & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    return allowed | (keys == queries)


class Attention(nn.Module):
    """Causal self-attention with grouped queries (https://arxiv.org/abs/2305.13245)."""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.head_dim, self.dropout = layer_idx, config.head_dim, config.dropout
        self.groups = config.num_attention_heads // config.num_key_value_heads
        heads, kv_heads = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x, cos, sin, bias=None, cu_seqlens=None, past_key_values=None, cache_position=None):
        """x: [B, T, H] -> [B, T, H]; bias as attention_bias gives it, or cu_seqlens as document_attention takes it."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cu_seqlens is not None:
            out = document_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens, T)
            return self.o_proj(out.view(B, T, -1))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, N or K, T, D]
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx, {"cache_position": cache_position})
        # fused kernels want one key per query head; copying keys is cheap beside scores, which are never built
        k, v = k.repeat_interleave(self.groups, dim=1), v.repeat_interleave(self.groups, dim=1)
        if bias is not None and bias.is_floating_point():
            bias = bias.to(q.dtype)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=self.dropout if self.training else 0.0, is_causal=bias is None and T > 1
        )
        out = self.o_proj(out.transpose(1, 2).reshape(B, T, -1))
        return F.dropout(out, self.dropout, self.training)


class MLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202): down(act(gate(x)) * up(x)), [*, H] -> [*, H]."""

    def __init__(self, config: MiniMindConfig, intermediate_size: int | None = None):
        super().__init__()
        width = intermediate_size or config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]
        self.dropout = config.dropout
        self.output_gate = nn.Linear(config.hidden_size, config.hidden_size, bias=False) if config.mlp_gate else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        if self.output_gate is not None:
            out = out * torch.sigmoid(self.output_gate(x))
        return F.dropout(out, self.dropout, self.training)


class Router(nn.Module):
    """Scores of each token for each expert; a module of its own so that its weight is called `mlp.gate.weight`."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[S, H] -> probabilities [S, E], in fp32 also under autocast, where near-ties would pick other experts."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float()).softmax(-1)


class MoE(nn.Module):
    """Each token goes to its top-k experts of E, and through the shared experts; the same code trains and evaluates."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        width = config.moe_intermediate_size
        self.top_k, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.alpha, self.seq_aux = config.aux_loss_alpha, config.seq_aux
        self.gate = Router(config)
        self.experts = nn.ModuleList(MLP(config, width) for _ in range(config.n_routed_experts))
        self.shared_experts = nn.ModuleList(MLP(config, width) for _ in range(config.n_shared_experts))

    def forward(self, x: torch.Tensor, token_weights: torch.Tensor, sequences: torch.Tensor):
        """x: [B, T, H]; token_weights, sequences: as balance_loss. Returns ([B, T, H], balance loss scalar)."""
        flat = x.reshape(-1, x.size(-1))  # [S, H]
        scores = self.gate(flat)  # [S, E]
        weights, chosen = scores.topk(self.top_k, dim=-1)  # [S, k]
        if self.normalise and self.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        elif self.normalise:
            # a lone weight normalises to 1; divided by a constant copy of itself it is 1 and still has a gradient
            weights = weights / weights.detach()
        out = self.way(flat)(flat, weights, chosen)
        for expert in self.shared_experts:
            out = out + expert(flat)
        return out.view_as(x), self.balance_loss(scores, chosen, token_weights, sequences)

    def way(self, flat: torch.Tensor):
        """The method that runs the experts: the one that costs least where the host must not wait for the device."""
        device = flat.device.type
        if device == "cpu":
            return self.dispatch
        half = (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else flat.dtype) == torch.bfloat16
        plain = self.experts[0].output_gate is None and not (self.training and self.experts[0].dropout)
        aligned = all(dim % 8 == 0 for dim in self.experts[0].gate_proj.weight.shape)  # to the kernel's 16 bytes
        if device == "cuda" and half and plain and aligned and hasattr(F, "grouped_mm"):
            # elsewhere torch's grouped product asks the GPU for the counts, and the host waits
            return self.run_grouped if torch.cuda.get_device_capability()[0] in (9, 10) else self.run_all
        return self.run_all

    def dispatch(self, flat: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Each expert runs on its own tokens. The shapes depend on the routing, which is free to know on a CPU."""
        order = chosen.flatten().argsort(stable=True)  # places in the [S * k] list of choices, by expert
        tokens = order // self.top_k
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        # an expert without tokens runs on none: its zero gradient keeps DDP from waiting for it
        parts = [e(part) for e, part in zip(self.experts, flat[tokens].split(counts), strict=True)]
        parts = torch.cat(parts) * weights.flatten()[order, None].to(parts[0].dtype)
        return torch.zeros_like(flat, dtype=parts.dtype).index_add(0, tokens, parts)

    def run_grouped(self, flat: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Each expert runs on its own tokens, all in one grouped product; how many they are stays on the GPU."""
        experts, order = chosen.flatten().sort(stable=True)
        tokens = order // self.top_k
        ends = torch.searchsorted(experts, torch.arange(len(self.experts), device=flat.device), right=True).int()

        def product(x: torch.Tensor, name: str) -> torch.Tensor:
            stacked = torch.stack([getattr(expert, name).weight for expert in self.experts]).to(x.dtype)
            return F.grouped_mm(x, stacked.transpose(1, 2), offs=ends)

        device = flat.device.type
        x = flat[tokens].to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else flat.dtype)
        parts = product(self.experts[0].act(product(x, "gate_proj")) * product(x, "up_proj"), "down_proj")
        parts = parts * weights.flatten()[order, None].to(parts.dtype)
        return torch.zeros_like(flat, dtype=parts.dtype).index_add(0, tokens, parts)

    def run_all(self, flat: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Every expert runs on every token, and all but the chosen count 0: fixed shapes, so the host never waits."""
        share = torch.zeros(len(flat), len(self.experts), device=flat.device, dtype=weights.dtype)
        share = share.scatter(1, chosen, weights)  # [S, E]
        return sum(e(flat) * share[:, i, None].to(flat.dtype) for i, e in enumerate(self.experts))

    def balance_loss(self, scores, chosen, token_weights, sequences) -> torch.Tensor:
        """E * sum over experts of (share of choices) * (mean probability), least when all are equal to 1/E.

        Per sequence and then averaged by tokens (`seq_aux`, DeepSeekMoE https://arxiv.org/abs/2401.06066 eq. 14-16), or
        over the batch (Switch Transformer https://arxiv.org/abs/2101.03961 eq. 4).

        Args:
            scores: [S, E]; chosen: [S, k]; token_weights: 0 for tokens that do not count, [B, T] with B * T = S.
            sequences: int64, 0 and up; [S], which sequence (a row, or a document of a packed row) each token is in.
        """
        E = scores.size(-1)
        weight = token_weights.reshape(-1, 1).float()
        used = F.one_hot(chosen, E).sum(1) * weight / self.top_k  # [S, E]
        probability, tokens = scores * weight, weight.sum().clamp(min=1)
        if not self.seq_aux:
            return self.alpha * E * (used.sum(0) * probability.sum(0)).sum() / tokens**2
        # one row per token would always do; a sum over sequences needs no more, and no look at how many there are
        sums = scores.new_zeros(len(scores), 2 * E + 1).index_add(
            0, sequences, torch.cat([used, probability, weight], 1)
        )
        used, probability, length = sums.split([E, E, 1], dim=1)
        per_sequence = E * (used * probability).sum(-1) / length.squeeze(1).clamp(min=1)  # times its tokens
        return self.alpha * per_sequence.sum() / tokens


class MiniMindBlock(nn.Module):
    """Pre-norm transformer block. The sums are out of place: the residual stream stays fp32 under autocast."""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.use_moe else MLP(config)
        self.use_moe = config.use_moe

    def forward(self, x, cos, sin, bias, cu_seqlens, balance, past_key_values=None, cache_position=None):
        """x: [B, T, H] -> ([B, T, H], balance loss scalar or None); balance: what MoE.forward takes beside x."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, bias, cu_seqlens, past_key_values, cache_position)
        normed = self.post_attention_layernorm(x)
        if not self.use_moe:
            return x + self.mlp(normed), None
        out, aux_loss = self.mlp(normed, *balance)
        return x + out, aux_loss


class MiniMindPreTrainedModel(PreTrainedModel):
    config_class = MiniMindConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniMindBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_cache_class = True  # transformers 4
    _supports_static_cache = True  # transformers 4
    _can_compile_fullgraph = False  # transformers 5

    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding, Router)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


class MiniMindModel(MiniMindPreTrainedModel):
    """Embedding, blocks and final norm: token ids in, hidden states out."""

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MiniMindBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = self.blocks_compiled = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        document_ids=None,
        cu_seqlens=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        token_weights=None,
        **kwargs,
    ) -> MiniMindOutput:
        """Arguments as in MiniMindForCausalLM.forward; the output's `hidden_states[-1]` is the normed last layer."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T, H]
        B, T, _ = x.shape
        x = F.dropout(x, self.config.dropout, self.training)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past_len = 0 if past_key_values is None else past_key_values.get_seq_length()
        cache_position = torch.arange(T, device=x.device) + past_len
        if position_ids is None:
            position_ids = cache_position[None]
        bias, bounds = None, cu_seqlens
        if not self._has_kernel(x, attention_mask, cu_seqlens, past_key_values):
            bounds = None
            if cu_seqlens is not None and document_ids is None:
                document_ids = self._sequences(None, cu_seqlens, x).view(B, T) + 1
            key_len = self._key_length(past_key_values, past_len, T)
            bias = attention_bias(attention_mask, document_ids, T, past_len, key_len, x.device)
        if bounds is not None and self.blocks_compiled:  # once for any number of documents
            torch._dynamo.maybe_mark_dynamic(bounds, 0)
        cos, sin = rope_tables(self.config, position_ids)
        balance = None
        if self.config.use_moe:
            if token_weights is None:
                token_weights = self._real_tokens(attention_mask, document_ids, x)
            balance = token_weights, self._sequences(document_ids, cu_seqlens, x)

        states, aux_losses = [x], []
        for layer in self.layers:
            inputs = (cos, sin, bias, bounds, balance, past_key_values, cache_position)
            if self.gradient_checkpointing and self.training:
                x, aux_loss = self._gradient_checkpointing_func(layer.__call__, x, *inputs)
            else:
                x, aux_loss = layer(x, *inputs)
            aux_losses.append(aux_loss)
            if output_hidden_states:
                states.append(x)
        return MiniMindOutput(
            past_key_values=past_key_values,
            hidden_states=(*states[:-1], self.norm(x)) if output_hidden_states else (self.norm(x),),
            aux_loss=sum(aux_losses) if self.config.use_moe else x.new_zeros((), dtype=torch.float32),
        )

    @staticmethod
    def _key_length(past_key_values, past_len, query_len: int) -> int:
        """Keys that the attention will see: a static cache always shows its whole length, a growing one what it has."""
        if past_key_values is None:
            return query_len
        if getattr(past_key_values, "is_compileable", False):
            size = getattr(past_key_values, "get_max_length", None) or past_key_values.get_max_cache_shape
            return size()
        return past_len + query_len

    def _has_kernel(self, x: torch.Tensor, attention_mask, cu_seqlens, past_key_values) -> bool:
        """Whether attention can go by cu_seqlens instead of a mask."""
        if cu_seqlens is None or attention_mask is not None or past_key_values is not None:
            return False
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        dropout = self.config.dropout if self.training else 0.0
        return can_attend(device, dtype, self.config.head_dim, dropout)

    @staticmethod
    def _sequences(document_ids, cu_seqlens, x: torch.Tensor) -> torch.Tensor:
        """[B * T] int64, below B * T: a number for the document, or else the row, that each token is in."""
        B, T, _ = x.shape
        places = torch.arange(B * T, device=x.device)
        if cu_seqlens is not None:
            return torch.bucketize(places, cu_seqlens[1:], right=True)
        if document_ids is not None:  # (padding counts for nothing, so it may go with the first document)
            return places // T * T + (document_ids.flatten() - 1).clamp(min=0)
        return places // T

    @staticmethod
    def _real_tokens(attention_mask, document_ids, x) -> torch.Tensor:
        """[B, T], 1 for real tokens: what the balance loss counts when there are no labels to count by."""
        if document_ids is not None:
            return document_ids > 0
        if attention_mask is not None and attention_mask.dim() == 2:
            return attention_mask[:, -x.size(1) :].bool()
        return torch.ones(x.shape[:2], device=x.device, dtype=torch.bool)


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """The language model: MiniMindModel and the output layer, whose weight is the embedding's."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = False  # else the Hugging Face Trainer takes the loss for a sum

    def __init__(self, config: MiniMindConfig | None = None):
        config = config or MiniMindConfig()
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.label_smoothing = 0.0  # in training mode, share of each label spread over the vocabulary
        self.post_init()

    # by these four methods the early transformers 4 find the two layers whose weights they tie and resize
    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        cu_seqlens: torch.IntTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        label_positions: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        return_logits: bool = True,
        **kwargs,
    ) -> MiniMindOutput:
        """Next-token logits, and with labels the loss.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, past + T], 1 for real tokens, 0 for padding on either side.
            position_ids: [B, T]; None counts on from the cache.
            document_ids: [B, T], equal within one packed document, 0 for padding; attention stays inside a document.
            cu_seqlens: int32 [documents + 1], places in the flattened batch where the documents (a run of padding is
                one too) begin, and B * T at the end: with it attention costs what the documents' lengths cost.
            labels: [B, T], the token at the same place or -100; the model shifts, as in Hugging Face models.
            label_positions: int64 [tokens], places in the flattened batch whose next token has a label. The output
                layer works on these alone; without them on all but a CPU, as finding them would hold up a GPU.
            logits_to_keep: only the last so many positions (0: all), or the positions in a tensor.
            return_logits: False spares a training step the logits of positions without a label.
        """
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            document_ids=document_ids,
            cu_seqlens=cu_seqlens,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache and not (self.training and self.model.gradient_checkpointing),
            output_hidden_states=output_hidden_states,
            token_weights=None if labels is None else F.pad(labels[:, 1:] != -100, (0, 1)),
        )
        hidden = output.hidden_states[-1]
        loss = loss_sum = tokens = logits = None
        if labels is not None:
            loss_sum, tokens = self.loss(hidden, labels, label_positions)
            loss = loss_sum / tokens.clamp(min=1) + output.aux_loss
        if return_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])
        # built anew: fields set later would stand behind the others, and callers take output[0] for the loss
        return MiniMindOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states if output_hidden_states else None,
            loss_sum=loss_sum,
            tokens=tokens,
            aux_loss=output.aux_loss,
        )

    def compile_blocks(self) -> None:
        """torch.compile every block in place; they share one graph for training and one for evaluation.

        Of a mixture only the attention: how many tokens an expert gets is known to no compiler.
        """
        self.model.blocks_compiled = True
        for layer in self.model.layers:
            (layer.self_attn if self.config.use_moe else layer).compile()

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor, label_positions: torch.Tensor | None = None):
        """Summed cross-entropy in fp32 and its number of tokens; hidden [B, T, H], labels [B, T]."""
        targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # [B * T]
        if label_positions is None and hidden.device.type == "cpu":
            label_positions = (targets != -100).nonzero().squeeze(1)
        hidden = hidden.flatten(0, 1)
        if label_positions is not None:
            hidden, targets = hidden[label_positions], targets[label_positions]
        tokens = (targets != -100).sum()
        weight = self.lm_head.weight
        if not torch.is_grad_enabled():  # which the function cannot see: it would work out gradients for nothing
            hidden, weight = hidden.detach(), weight.detach()
        # (a held-back loss is never smoothed: it would be no likelihood, and perplexity would not follow from it)
        smoothing = self.label_smoothing if self.training else 0.0
        return LinearCrossEntropy.apply(hidden, weight, targets, smoothing), tokens
