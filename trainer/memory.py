"""How much memory and disk a run will take, said before its first step; and what to do when the memory was too little.

Weights, gradients and moments are counted; what autograd keeps for the backward pass follows from a sum over the
tensors of a layer that the tests hold against what torch really keeps.

    print(describe(estimate(lm_config, args, trained, parameters), args.device))
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from model.model_minimind import LinearCrossEntropy
from model.packed_attention import can_attend

GB = 1e9
MEMINFO = Path("/proc/meminfo")
# what allocators say that raise a plain RuntimeError: the CPU's (Linux, Windows), Apple's, CUDA's driver and its BLAS
OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, on whatever device, had nothing left to give."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def advice(args) -> str:
    """One line: the flags that would save memory beside those that are set, what costs least first."""
    ways, on_cuda = [], args.device.startswith("cuda")
    if args.batch_size > 1:
        half = args.batch_size // 2
        more = args.accumulation_steps * -(-args.batch_size // half)
        ways.append(f"--batch_size {half} --accumulation_steps {more} (the same result)")
    if on_cuda and args.oom_policy == "raise":
        ways.append("--oom_policy shrink (does that by itself)")
    if on_cuda and "expandable_segments:True" not in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        ways.append("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment (against gaps)")
    if args.dtype == "float32":
        ways.append("--dtype bfloat16")
    if not args.gradient_checkpointing:
        ways.append("--gradient_checkpointing 1 (a third more time)")
    ways.append(f"--max_seq_len below {args.max_seq_len}, or a smaller --preset")
    return "to save memory: " + "; ".join(ways)


# --- memory -----------------------------------------------------------------------------------------------------------


def estimate(lm_config, args, trained_parameters: int, all_parameters: int) -> dict[str, int]:
    """Bytes that training takes on the device of one process, as the largest sum of a step.

    Weights, gradients and moments are fp32. Activations are what autograd keeps of batch_size x max_seq_len tokens, as
    if everything were trained: layers below the first that is trained keep less. Not counted: torch itself, scratch
    space of its kernels and the gaps of the allocator (a process on a CPU was seen to grow by 0.2 to 0.3 GB more), a
    compiled block (which keeps less), dropout's masks.

    Args:
        args: device and dtype as init_environment leaves them, not auto.

    Returns: {"weights", "gradients", "optimizer", "activations", "logits", "total"}; logits: of the loss, in chunks.
    """
    half = args.dtype != "float32"
    embedding = min(lm_config.vocab_size * lm_config.hidden_size, trained_parameters)
    moments = trained_parameters + (embedding if args.optimizer == "muon" else trained_parameters)
    parts = {
        "weights": 4 * all_parameters,
        # DDP sends them from buckets of the same size
        "gradients": 4 * trained_parameters * (2 if dist.is_initialized() else 1),
        "optimizer": 4 * moments,
        "activations": activations(lm_config, args),
        "logits": _loss(lm_config, args.batch_size * args.max_seq_len, half, args.device, trained_parameters > 0),
    }
    return parts | {"total": sum(parts.values())}


def activations(config, args) -> int:
    """Bytes that autograd keeps of the network's forward pass, without the loss; with --gradient_checkpointing the
    inputs of the layers and one layer's tensors, as the backward pass makes them again layer by layer.
    """
    half, tokens = args.dtype != "float32", args.batch_size * args.max_seq_len
    kind = torch.device(args.device).type
    layer = _attention(config, args, kind, half) + _feed_forward(config, kind, args.dtype)
    layer += 2 * _norm(config.hidden_size)
    copies = 2 * _matrices(config) if half else 0  # autocast's of the weights, kept as long as their inputs
    once = _norm(config.hidden_size) + 2 * 4 * config.head_dim + 48  # last norm, cos and sin, ids and labels
    if args.gradient_checkpointing:
        kept = 4 * config.hidden_size * config.num_hidden_layers
        return int(tokens * (layer + kept + once) + copies)
    return int(config.num_hidden_layers * (tokens * layer + copies) + tokens * once)


def _norm(size: int) -> int:
    """Bytes per token: the residual stream and its normed copy, fp32 under autocast too."""
    return 2 * 4 * size


def _attention(config, args, kind: str, half: bool) -> float:
    """Bytes per token: input, q, k, v and what goes into the output layer; q and k before their norms."""
    size = 2 if half else 4
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    dtype = getattr(torch, args.dtype)
    if args.packing and can_attend(kind, dtype, config.head_dim, config.dropout):
        values = config.hidden_size + 2 * q + 2 * kv
    else:  # keys and values copied for each query head
        values = config.hidden_size + 4 * q
    # q and k before and after their norms' division, in fp32; under autocast one more copy of both, and bf16 ones
    norms = (q + kv) * (10 if half else 8) if config.qk_norm else 0
    return size * values + norms


def _feed_forward(config, kind: str, dtype: str) -> float:
    """Bytes per token of an MLP, or of a mixture by the way that MoE.way takes on that device."""
    size, hidden, experts = 4 if dtype == "float32" else 2, config.hidden_size, config.n_routed_experts
    gate = 2 * hidden if config.mlp_gate else 0
    if not config.use_moe:
        return size * (hidden + 4 * config.intermediate_size + gate)
    expert = 4 * config.moe_intermediate_size + gate
    shared = config.n_shared_experts * expert
    if _runs_all_experts(config, kind, dtype):
        values = experts * (expert + hidden) + hidden + shared
    else:  # the tokens gathered, the experts' outputs, and those times their weights
        values = config.num_experts_per_tok * (expert + 3 * hidden) + shared
        values += hidden if config.n_shared_experts or dtype == "float32" else 0
    router = 4 * (8 * experts + 16) + (4 * hidden if dtype != "float32" else 0)
    return size * values + router


def _runs_all_experts(config, kind: str, dtype: str) -> bool:
    if kind == "cpu":
        return False
    grouped = kind == "cuda" and dtype == "bfloat16" and hasattr(F, "grouped_mm") and not config.mlp_gate
    return not (grouped and torch.cuda.get_device_capability()[0] in (9, 10))


def _matrices(config) -> int:
    """Weights of one layer's linear layers."""
    hidden, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    gate = hidden * hidden if config.mlp_gate else 0
    if not config.use_moe:
        return 2 * hidden * heads * config.head_dim + 3 * hidden * config.intermediate_size + gate
    experts = config.n_routed_experts + config.n_shared_experts
    return 2 * hidden * heads * config.head_dim + experts * (3 * hidden * config.moe_intermediate_size + gate)


def _loss(config, tokens: int, half: bool, device: str, trains: bool) -> int:
    """Bytes of the output layer: hidden states and their gradient, a chunk's logits, the weight and its gradient."""
    size, hidden, vocab = 2 if half else 4, config.hidden_size, config.vocab_size
    chunk = min(LinearCrossEntropy.chunk(torch.device(device).type, vocab), tokens)
    states = tokens * hidden * size * (1 + trains)
    return states + chunk * vocab * (4 + size) + vocab * hidden * ((4 + size) * trains + (2 if half else 0))


def free_memory(device: str) -> int | None:
    """Bytes that are free now on the GPU, or in RAM (Linux, or where psutil is installed); None where nobody knows."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if MEMINFO.exists():
        return 1024 * int(MEMINFO.read_text(encoding="utf-8").split("MemAvailable:")[1].split()[0])
    try:
        import psutil
    except ImportError:
        return None
    return psutil.virtual_memory().available


def describe(estimate: dict[str, int], device: str) -> str:
    """One line: the sum, its parts, and what is free."""
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in estimate.items() if name != "total")
    free = free_memory(device)
    there = "" if free is None else f", {_gb(free)} GB are free here"
    return f"memory: about {_gb(estimate['total'])} GB ({parts}){there}"


def warning(estimate: dict[str, int], device: str) -> str | None:
    """A line where the run is not going to fit, else None; the weights are taken to be on the device already."""
    free, needed = free_memory(device), estimate["total"] - estimate["weights"]
    if free is None or needed <= free:
        return None
    return f"warning: about {_gb(needed)} GB more will be needed and {_gb(free)} GB are free"


def _gb(size: float) -> str:
    """Gigabytes: 23, 1.9, 0.25, 0.0042."""
    number = size / GB
    digits = 0 if number >= 10 else 1 if number >= 1 else 2 if number >= 0.01 else 4
    return f"{number:.{digits}f}"


# --- disk -------------------------------------------------------------------------------------------------------------


def disk_needed(parameters: int, args) -> int:
    """Bytes of the run's files: weights, the best ones where there is a validation, and --keep_checkpoints states to
    resume from (fp32 weights and moments); one more of weights and states, as a file is there beside the one whose
    place it takes until it is whole.
    """
    validates = bool(args.val_path or args.val_ratio)
    weights = parameters * (4 if args.save_dtype == "float32" else 2)
    state = parameters * (8 if args.optimizer == "muon" else 12)
    return weights * (2 + validates) + state * (args.keep_checkpoints + 1)


def disk_warning(parameters: int, args) -> str | None:
    """A line where the disk of --checkpoint_dir or --save_dir has fewer bytes left than disk_needed says, else None."""
    needed = disk_needed(parameters, args)
    for folder in (args.checkpoint_dir, args.save_dir):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        if needed > free:
            return (
                f"warning: the run's files take up to {_gb(needed)} GB and {there} has {_gb(free)} GB left: make room, "
                "pass another --save_dir and --checkpoint_dir, or a smaller --keep_checkpoints"
            )
    return None
