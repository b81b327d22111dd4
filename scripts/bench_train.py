"""How fast a training step is here: real tokens per second, and the share of what the machine can multiply.

    python scripts/bench_train.py --preset small --stage sft --data_path dataset/sft_zh.jsonl --max_seq_len 512
    python scripts/bench_train.py --compare --stage pretrain --data_path dataset/pretrain_hq.jsonl
    python scripts/bench_train.py --preset moe --dense_twin          # a mixture against a dense model as active as it

--compare runs two ways in turn, in one process, a step of each at a time, and prints the median of the ratios of real
tokens per second: this repository's, and MiniMind's (each row padded to max_seq_len, eager, the logits of every
position, fp32 on a CPU and autocast on CUDA; same rows, same network, same optimizer).

Real tokens are those that are no padding. The operations of a step are 6 per token and multiplied parameter, those of
the output layer only where a label is, and 6 * hidden size * length^2 per document and layer for causal attention.
The peak is the best of a few square products, measured in the same run. The process's memory is that of all ways.
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.packing import Collator, Rows
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.arguments import ROOT, SAMPLE_DIR, add_model_flags, friendly_errors, input_path, positive_int, stated_sizes
from trainer.hardware import choose_device, choose_dtype, keep_freed_memory, why_no_compile
from trainer.optimizer import make_optimizer
from trainer.trainer_utils import init_tokenizer, setup_seed


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--stage", default="sft", choices=["pretrain", "sft"])
    add("--data_path", help="rows to train on; dataset/sample/{stage}.jsonl if left out")
    add("--tokenizer_path", default=str(ROOT / "model"))
    add("--max_seq_len", type=positive_int, default=512)
    add("--batch_size", type=positive_int, default=16, help="rows per step")
    add("--device", default="auto")
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    add("--use_compile", default="auto", choices=["auto", "0", "1"], help="auto: if it works here")
    add("--optimizer", default="adamw", choices=["adamw", "muon"])
    add("--packing", type=int, choices=[0, 1], default=1)
    add("--steps", type=positive_int, default=5, help="steps that are measured; at least 5 of each way with --compare")
    add("--compare", action="store_true", help="against MiniMind's way")
    add("--dense_twin", action="store_true", help="a mixture against a dense model with the same active parameters")
    add("--json", action="store_true", help="one JSON object per line, the last one with the ratio if there is one")
    add("--seed", type=int, default=42)
    add_model_flags(parser)
    parser.set_defaults(learning_rate=1e-4, weight_decay=0.1, param_groups=[])
    args = parser.parse_args(argv)
    args.device = choose_device(args.device)
    args.dtype = choose_dtype(args.dtype, args.device)
    if args.compare:
        args.steps = max(args.steps, 5)
    return args


class Way:
    """One way to train: a model, its optimizer, and batches without end.

    Args:
        padded: MiniMind's way, else ours.
    """

    def __init__(self, name: str, args, config: MiniMindConfig, dataset, padded: bool = False):
        self.name, self.args, self.padded = name, args, padded
        on_cpu = torch.device(args.device).type == "cpu"
        self.dtype = "float32" if padded and on_cpu else args.dtype
        self.rows = Rows(dataset, packing=bool(args.packing) and not padded, seed=args.seed)
        self.collate = Collator(args.max_seq_len, dataset.pad_token_id)
        setup_seed(args.seed)
        self.model = MiniMindForCausalLM(config).to(args.device).train()
        self.optimizer = make_optimizer(args, self.model)
        self.scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=self.dtype == "float16")
        self.random = np.random.default_rng(args.seed)
        # of the whole data: which of them a step meets is luck
        self.fill = self.rows.report["fill"]
        if not padded and args.use_compile == "1":
            self.model.compile_blocks()
        began = time.perf_counter()
        self.step()
        self.first_seconds = time.perf_counter() - began
        self.seconds, self.flops, self.gpu_memory = [], [], 0.0

    def step(self) -> float:
        """Train on a batch; returns its operations."""
        size = min(self.args.batch_size, len(self.rows))
        batch = self.collate([self.rows[int(i)] for i in self.random.integers(len(self.rows), size=size)])
        flops = operations(self.model.config, batch)
        batch = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
        kind = torch.device(self.args.device).type
        half = torch.autocast(kind, dtype=getattr(torch, self.dtype)) if self.dtype != "float32" else nullcontext()
        with half:
            loss = minimind_loss(self.model, batch) if self.padded else our_loss(self.model, batch)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.args.device)
        return flops

    def measure(self) -> float:
        """One more step on the clock; returns its real tokens per second."""
        on_gpu = torch.device(self.args.device).type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        self.flops.append(self.step())
        self.seconds.append(time.perf_counter() - began)
        if on_gpu:
            self.gpu_memory = max(self.gpu_memory, torch.cuda.max_memory_allocated() / 2**20)
        return self.tokens_per_second(self.seconds[-1])

    def tokens_per_second(self, seconds: float) -> float:
        return min(self.args.batch_size, len(self.rows)) * self.args.max_seq_len * self.fill / seconds

    def result(self, peak: float) -> dict:
        seconds = statistics.median(self.seconds)
        tokens = self.tokens_per_second(seconds)
        speed = statistics.median(flops / s for flops, s in zip(self.flops, self.seconds, strict=True))
        return {
            "way": self.name,
            "dtype": self.dtype,
            "compiled": int(not self.padded and self.args.use_compile == "1"),
            "tokens_per_second": round(tokens, 1),
            "positions_per_second": round(tokens / self.fill, 1),
            "padding_share": round(1 - self.fill, 4),
            "ms_per_step": round(seconds * 1e3, 1),
            "first_step_seconds": round(self.first_seconds, 1),
            "tflops": round(speed / 1e12, 4),
            "share_of_peak": round(speed / peak, 4),
        } | ({"gpu_memory_mb": round(self.gpu_memory)} if self.gpu_memory else {})


def our_loss(model, batch):
    output = model(**batch, return_logits=False)
    return output.loss_sum / output.tokens + output.aux_loss


def minimind_loss(model, batch):
    """The mean over masked positions of a loss that was worked out for all of them."""
    output = model(batch["input_ids"][:, :-1])
    targets = batch["labels"][:, 1:].flatten()
    mask = targets != -100
    losses = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.clamp(min=0), reduction="none")
    return (losses * mask).sum() / mask.sum() + output.aux_loss


def operations(config: MiniMindConfig, batch: dict) -> float:
    """Floating-point operations that the real tokens of a batch need, forward and backward."""
    tokens, labels = int((batch["document_ids"] > 0).sum()), len(batch["label_positions"])
    lengths = batch["cu_seqlens"].diff().double()
    # a run of padding is a document, too, in cu_seqlens; what it costs is not needed by anything
    lengths = lengths[batch["document_ids"].flatten()[batch["cu_seqlens"][:-1].long()] > 0]
    width = config.num_attention_heads * config.head_dim
    attention = config.num_hidden_layers * 6 * width * float((lengths**2).sum())
    return 6 * (multiplied_parameters(config) * tokens + config.vocab_size * config.hidden_size * labels) + attention


def multiplied_parameters(config: MiniMindConfig) -> int:
    """Weights of the blocks that one token is multiplied with."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    mlp = 3 * hidden * config.intermediate_size
    if config.use_moe:
        experts = config.num_experts_per_tok + config.n_shared_experts
        mlp = experts * 3 * hidden * config.moe_intermediate_size + hidden * config.n_routed_experts
    return config.num_hidden_layers * (2 * hidden * heads + 2 * hidden * keys + mlp)


def dense_twin(config: MiniMindConfig) -> MiniMindConfig:
    """A dense model whose MLPs are as wide as all that a token of the mixture passes through."""
    experts = config.num_experts_per_tok + config.n_shared_experts
    return MiniMindConfig(
        **{name: value for name, value in config.to_dict().items() if name in ("hidden_size", "num_hidden_layers")},
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        qk_norm=config.qk_norm,
        intermediate_size=experts * config.moe_intermediate_size,
    )


def measured_peak(args) -> float:
    """Operations per second of the best of a few square matrix products, in the precision of the training."""
    best, dtype = 0.0, getattr(torch, args.dtype)
    repeats = 20 if torch.device(args.device).type == "cuda" else 1  # else it is the waiting that is measured
    for n in (2048, 3072, 4096):
        a, b = (torch.randn(n, n, device=args.device, dtype=dtype) for _ in range(2))
        for _ in range(4):
            synchronize(args.device)
            began = time.perf_counter()
            for _ in range(repeats):
                a @ b
            synchronize(args.device)
            best = max(best, repeats * 2 * n**3 / (time.perf_counter() - began))
    return best


def synchronize(device: str) -> None:
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize()
    elif kind == "mps":
        torch.mps.synchronize()


def peak_memory() -> float:
    """Megabytes of the whole process at the most, all ways together; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def read(args):
    tokenizer = init_tokenizer(args.tokenizer_path)
    path = input_path(args.data_path or SAMPLE_DIR / f"{args.stage}.jsonl")
    kind = SFTDataset if args.stage == "sft" else PretrainDataset
    return kind(path, tokenizer, args.max_seq_len, on_bad_row="skip")


def show(args, result: dict) -> None:
    if args.json:
        print(json.dumps(result), flush=True)
        return
    texts = (f"{name} {value:,}" if isinstance(value, float | int) else str(value) for name, value in result.items())
    print("  ".join(texts), flush=True)


def main(args):
    if torch.device(args.device).type == "cpu":
        keep_freed_memory()
    reason = None if args.use_compile == "0" else why_no_compile(args.device)
    args.use_compile = str(int(args.use_compile != "0" and reason is None))
    if reason:
        print(f"not compiled: {reason}", file=sys.stderr)
    config = MiniMindConfig(**stated_sizes(args))
    dataset = read(args)
    ways = [Way("ours", args, config, dataset)]
    if args.compare:
        ways.append(Way("minimind", args, config, dataset, padded=True))
    if args.dense_twin:
        if not config.use_moe:
            raise ValueError("--dense_twin compares a mixture of experts: pass --preset moe or --use_moe 1")
        ways.append(Way("dense", args, dense_twin(config), dataset))
    speeds = {way.name: [] for way in ways}
    for _ in range(args.steps):
        for way in ways:
            speeds[way.name].append(way.measure())
    peak = measured_peak(args)
    for way in ways:
        show(args, way.result(peak))
    machine = {"device": args.device, "threads": torch.get_num_threads(), "peak_tflops": round(peak / 1e12, 3)}
    show(args, machine | {"process_memory_mb": round(peak_memory())})
    for other in ways[1:]:
        ratios = [a / b for a, b in zip(speeds["ours"], speeds[other.name], strict=True)]
        result = {"against": other.name, "ratio": round(statistics.median(ratios), 2)}
        show(args, result | {"lowest": round(min(ratios), 2), "highest": round(max(ratios), 2), "pairs": len(ratios)})


if __name__ == "__main__":
    with friendly_errors():
        main(parse_args())
