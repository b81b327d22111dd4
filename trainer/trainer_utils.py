"""Small functions that every stage needs: processes, seeds, devices, the learning rate, checkpoints, models."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from model.weights import find_weights, load_model
from trainer.arguments import ROOT
from trainer.checkpoint import Checkpoints, resume_path
from trainer.hardware import choose_device, choose_dtype, keep_freed_memory
from trainer.monitor import say
from trainer.schedule import get_lr, get_lr_with_warmup  # noqa: F401 (MiniMind keeps them here)

GRADIENT_BUCKET = 1 << 24  # gradients averaged at a time

# --- processes --------------------------------------------------------------------------------------------------------


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def Logger(content: str) -> None:  # noqa: N802 (MiniMind's name)
    """Print once, not once per process; above a progress bar if there is one."""
    if is_main_process():
        say(str(content))


def init_distributed_mode(device: str = "cpu", timeout_minutes: float = 30.0) -> int:
    """Join the group of processes that torchrun started, if it did; returns the local rank (0 without torchrun).

    NCCL where each process has a CUDA GPU of its own, gloo otherwise (CPU, Windows), and for what CPUs agree upon.

    Args:
        timeout_minutes: a process that waits longer than this for another one takes it for lost.
    """
    if "RANK" not in os.environ:
        return 0
    on_cuda = device.startswith("cuda")
    local_rank = int(os.environ["LOCAL_RANK"])
    if on_cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} has no GPU of its own, there are {torch.cuda.device_count()}: "
            "lower --nproc_per_node, or pass --device cpu"
        )
    if on_cuda:
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if on_cuda and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    return local_rank


def agree(*flags: bool) -> list[bool]:
    """Each flag, true on all processes if it is on any. Between CPUs: no GPU waits."""
    if not dist.is_initialized():
        return list(flags)
    raised = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return raised.bool().tolist()


def add_up(tensor: torch.Tensor) -> None:
    """Sum over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)


def gather(value) -> list:
    """The value of every process, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """What DDP does during the backward pass, done after it, some megabytes at a time."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    while gradients:
        size, bucket = 0, []
        while gradients and (not bucket or size + gradients[0].numel() <= GRADIENT_BUCKET):
            size += gradients[0].numel()
            bucket.append(gradients.pop(0))
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        parts = (flat / get_world_size()).split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])


def lost_peer(error: RuntimeError) -> bool:
    """Whether an error of torch.distributed means that another process is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        part in text for part in ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
    )


def from_main(function, *args):
    """What function(*args) returns on the main process, given to all; an OSError or ValueError is raised by all."""
    if not dist.is_initialized():
        return function(*args)
    box = [None, None]
    if is_main_process():
        try:
            box[0] = function(*args)
        except (OSError, ValueError) as error:
            box[1] = error
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    if box[1] is not None:
        raise box[1]
    return box[0]


def setup_seed(seed: int) -> None:
    """Seed Python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_rng_state() -> dict:
    """The state of all random generators, in types that torch.load(weights_only=True) accepts."""
    name, keys, *rest = np.random.get_state()
    version, state, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, keys.tolist(), *rest],
        "python": [version, list(state), gauss],
    }


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside DDP and torch.compile: for generating, saving and reading the config."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return getattr(model, "_orig_mod", model)


# --- order of the data ------------------------------------------------------------------------------------------------


class SkipBatchSampler:
    """Batches of indices for one process, the first ones skipped when a run is resumed.

    Every `rows_per_update` indices of `order` make one update. They are dealt out in rounds of `world_size *
    batch_size`, each round cut evenly over the processes; so N processes with batches of b see in each round what one
    process with batches of N*b sees. If a round has too few rows to go round, a process without any gets the first row
    again, and `is_filler` says that it must not count.

    Args:
        skip_batches: batches, counted as in __iter__, that were trained on before.
        rows_per_update: one round if left out. A run that is resumed by another number of processes keeps it.
    """

    def __init__(
        self,
        order: Sequence[int],
        batch_size: int,
        skip_batches: int = 0,
        rank: int = 0,
        world_size: int = 1,
        rows_per_update: int | None = None,
    ):
        self.order, self.batch_size, self.skip_batches = order, batch_size, skip_batches
        self.rank, self.world_size = rank, world_size
        self.rows_per_update = rows_per_update or batch_size * world_size

    @property
    def batches_per_update(self) -> int:
        return math.ceil(self.rows_per_update / (self.batch_size * self.world_size))

    def __len__(self) -> int:
        updates, rest = divmod(len(self.order), self.rows_per_update)
        last = math.ceil(rest / (self.batch_size * self.world_size))
        return max(updates * self.batches_per_update + last - self.skip_batches, 0)

    def share(self, number: int) -> list[int]:
        """This process's indices of batch `number`, counted from the beginning of the order; none for a filler."""
        update, number = divmod(number, self.batches_per_update)
        size, start = self.batch_size * self.world_size, update * self.rows_per_update
        end = min(start + (number + 1) * size, start + self.rows_per_update)
        rows = list(self.order[start + number * size : end])
        share = math.ceil(len(rows) / self.world_size)
        return rows[self.rank * share : (self.rank + 1) * share]

    def is_filler(self, number: int) -> bool:
        return not self.share(number)

    def is_full(self, number: int) -> bool:
        return len(self.share(number)) == self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.skip_batches, self.skip_batches + len(self)):
            yield self.share(number) or [self.order[0]]


class StreamShare(IterableDataset):
    """The batches of one process from a stream that all of them read alike, as a SkipBatchSampler cuts them."""

    def __init__(self, stream: IterableDataset, sampler: SkipBatchSampler):
        self.stream, self.sampler = stream, sampler

    def __iter__(self) -> Iterator[list]:
        rows, at = iter(self.stream), 0
        for share in self.sampler:
            wanted = set(share)
            batch = []
            while at <= share[-1]:
                row = next(rows)
                if at in wanted:
                    batch.append(row)
                at += 1
            yield batch


# --- checkpoints and models -------------------------------------------------------------------------------------------


def lm_checkpoint(
    lm_config,
    weight: str = "full_sft",
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    epoch: int = 0,
    step: int = 0,
    wandb=None,
    save_dir: str | Path = ROOT / "checkpoints",
    checkpoints: Checkpoints | None = None,
    **kwargs,
) -> dict | None:
    """With a model: write `{weight}_{hidden}{_moe}_resume.pth`. Without: read it, or give None where there is none.

    The file holds the model in full precision, the optimizer, epoch, step (updates done in that epoch), world_size,
    wandb_id, and each keyword: its state_dict() if it has one, else itself.

    Args:
        checkpoints: where to write or read and how many are kept, if not the newest two in save_dir.

    Raises:
        ValueError: there are files, and none can be read. OSError: it could not be written.
    """
    checkpoints = checkpoints or Checkpoints(resume_path(lm_config, weight, save_dir), say=Logger)
    if model is None:
        found = checkpoints.read()
        return found[0] if found else None
    state = {
        "model": unwrap(model).state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "step": step,
        "world_size": get_world_size(),
        "wandb_id": wandb.id if wandb is not None else None,
    }
    for name, value in kwargs.items():
        state[name] = value.state_dict() if callable(getattr(value, "state_dict", None)) else value
    checkpoints.write(state)
    return None


def init_tokenizer(path: str | Path):
    """The tokenizer in a folder; a path that is missing is an error, never taken for the name of a hub repository."""
    from transformers import AutoTokenizer

    from trainer.arguments import input_path

    return AutoTokenizer.from_pretrained(str(input_path(path)), trust_remote_code=False)


def init_model(
    lm_config,
    from_weight: str = "pretrain",
    tokenizer_path: str | Path = ROOT / "model",
    save_dir: str | Path = ROOT / "out",
    device: str = "cpu",
):
    """(model in train mode on the device, tokenizer): with the weights of that name, or fresh ones for "none"."""
    from model.model_minimind import MiniMindForCausalLM
    from model.weights import config_dict

    tokenizer = init_tokenizer(tokenizer_path)
    if from_weight == "none":
        if len(tokenizer) > lm_config.vocab_size:
            lm_config.vocab_size = len(tokenizer)
        model = MiniMindForCausalLM(lm_config)
    else:
        path = find_weights(save_dir, from_weight, lm_config.hidden_size, lm_config.use_moe)
        model = load_model(path, config_dict(lm_config), tokenizer, say=lambda text: None)
        Logger(f"weights: {path}")
    total, active = count_parameters(model)
    Logger(
        f"model: {total / 1e6:.2f}M parameters" + (f", {active / 1e6:.2f}M of them active" if active < total else "")
    )
    return model.to(device).train(), tokenizer


def count_parameters(model) -> tuple[int, int]:
    """(all, those that one token passes through): they differ for a mixture of experts."""
    config, total = model.config, sum(p.numel() for p in model.parameters())
    if not config.use_moe:
        return total, total
    expert = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts.0." in name)
    return total, total - expert * (config.n_routed_experts - config.num_experts_per_tok)


def init_environment(args) -> None:
    """Join the processes, choose device and precision (written back into args), seed."""
    args.chosen = [name for name in ("device", "dtype", "use_compile") if getattr(args, name) == "auto"]
    args.device = choose_device(args.device)
    if args.device == "mps" and "RANK" in os.environ:
        raise ValueError("several processes cannot share Apple's GPU: pass --device cpu, or start without torchrun")
    local_rank = init_distributed_mode(args.device, args.timeout_minutes)
    if args.device.startswith("cuda") and dist.is_initialized():
        args.device = f"cuda:{local_rank}"
    args.dtype = choose_dtype(args.dtype, args.device)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses cuBLAS without it
        torch.use_deterministic_algorithms(True)
    if args.device.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        keep_freed_memory()
    setup_seed(args.seed)
    Logger(f"device {args.device}, {args.dtype}, {get_world_size()} process(es), {torch.get_num_threads()} CPU threads")
