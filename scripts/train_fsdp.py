"""Pretraining of models that are too large for DDP: weights, gradients and moments are spread over the processes.

An example of FSDP2 (`torch.distributed.fsdp.fully_shard`) around this repository's model, data and weight files:
complete, but without the validation, guards and record of trainer/train_pretrain.py; docs/scale_out.md says when it
pays. A checkpoint of torch.distributed.checkpoint (dcp) contains pickles: resume your own only.

    torchrun --nproc_per_node 2 scripts/train_fsdp.py --preset tiny --data_path dataset/sample/pretrain.jsonl
    torchrun --nproc_per_node 2 scripts/train_fsdp.py ... --from_resume 1
    python eval_llm.py --weight fsdp --prompt "The sea"
"""

import math
import shutil
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as sharded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader

from dataset.lm_dataset import PretrainDataset
from model.weights import save_weights, tokenizer_digest, weight_path
from trainer.arguments import ROOT, friendly_errors, model_config, stage_parser, stated_sizes
from trainer.optimizer import parameter_groups
from trainer.rows import open_rows
from trainer.trainer_utils import Logger, SkipBatchSampler, get_lr_with_warmup, init_environment, init_model

# of the flags of a stage; any other is refused
HONOURED = """data_path sample_ratio sampling on_bad_row tokenizer_path max_seq_len packing cache_dir device dtype seed
    epochs max_steps batch_size accumulation_steps learning_rate warmup_ratio weight_decay grad_clip save_dir
    checkpoint_dir save_weight from_weight from_resume save_interval log_interval gradient_checkpointing preset"""


def parse_args(argv=None):
    data = ROOT / "dataset" / "pretrain_hq.jsonl"
    sizes = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "max_seq_len": 340}
    parser = stage_parser("FSDP", save_weight="fsdp", from_weight="none", data_path=data, **sizes)
    parser.set_defaults(save_interval=200, use_compile="0")
    args = parser.parse_args(argv)
    other = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    other = [f"--{name}" for name in other if name not in {*HONOURED.split(), *stated_sizes(args)}]
    if other:
        parser.error(f"{', '.join(other)}: not in this example, see trainer/train_pretrain.py")
    return args


def shard(model: torch.nn.Module, device_type: str, dtype: str) -> None:
    """One unit per block; embedding, output layer (the same tensor) and last norm stay together in the root's unit.

    The loss reads lm_head.weight without calling lm_head: the root's unit is whole during all of the root's forward.
    That unit is gathered in fp32, so the residual stream stays fp32 as under autocast; blocks are gathered in `dtype`,
    which halves what is sent. Gradients are summed in fp32, and the shards that the optimizer steps are fp32.
    """
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(getattr(torch, dtype), reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    held = sum(p.to_local().numel() for p in model.parameters())
    Logger(f"process 0 holds {held:,} of {sum(p.numel() for p in model.parameters()):,} parameters")


def windows(args, rows, collate, done: int):
    """Yield (update, its batches on this process), in the order of trainer.train_run, from update `done` on."""
    per_epoch = math.ceil(len(rows) / rows_per_update(args))
    for epoch in range(done // per_epoch, args.epochs):
        rows.set_epoch(epoch)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed + epoch)).tolist()
        first = max(done - epoch * per_epoch, 0)
        skip = first * args.accumulation_steps
        sampler = SkipBatchSampler(order, args.batch_size, skip, dist.get_rank(), dist.get_world_size())
        batches = enumerate(DataLoader(rows, batch_sampler=sampler, collate_fn=collate), start=skip)
        for update in range(epoch * per_epoch + first, (epoch + 1) * per_epoch):
            window = []
            for number, batch in islice(batches, args.accumulation_steps):
                if sampler.is_filler(number):  # this process has no row left, but must join in
                    batch["labels"].fill_(-100)
                    batch["label_positions"] = batch["label_positions"][:0]
                window.append({name: tensor.to(args.device) for name, tensor in batch.items()})
            yield update, window


def train_window(args, model, optimizer, window) -> torch.Tensor:
    """One update by the mean loss over all labels of all processes; returns that mean, a scalar."""
    tokens = torch.tensor(float(sum(len(batch["label_positions"]) for batch in window)), device=args.device)
    dist.all_reduce(tokens)
    device_type, dtype = torch.device(args.device).type, getattr(torch, args.dtype)
    loss_sum = torch.zeros((), device=args.device)
    for batch in window:
        with torch.autocast(device_type, dtype, enabled=args.dtype != "float32"):
            output = model(**batch, return_logits=False)
        # FSDP averages gradients over the processes: times their number it is the sum
        ((output.loss_sum + output.aux_loss * output.tokens) * dist.get_world_size() / tokens).backward()
        loss_sum += output.loss_sum.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    dist.all_reduce(loss_sum)
    return loss_sum / tokens


def rows_per_update(args) -> int:
    return args.batch_size * args.accumulation_steps * dist.get_world_size()


def checkpoints(folder: Path) -> list[Path]:
    """Those that are complete, oldest first: dcp writes .metadata last."""
    return sorted(metadata.parent for metadata in folder.glob("step_*/.metadata"))


def save(args, folder: Path, model, optimizer, step: int) -> None:
    """Each process writes its own shards; the newest two checkpoints are kept."""
    state = dict(zip(("model", "optimizer"), sharded.get_state_dict(model, optimizer), strict=True))
    dcp.save(state | {"step": step, "rows": rows_per_update(args)}, checkpoint_id=folder / f"step_{step:08d}")
    for old in checkpoints(folder)[:-2] if dist.get_rank() == 0 else []:
        shutil.rmtree(old)


def start(args, folder: Path, model, optimizer) -> int:
    """With --from_resume 1 put model and optimizer back to the last checkpoint, of however many processes it is.

    Returns: the updates done then. Raises: ValueError where rows would be trained twice or never.
    """
    if not args.from_resume or not checkpoints(folder):
        dist.barrier()  # nobody may still be looking when process 0 clears the folder of an older run
        if dist.get_rank() == 0 and folder.exists():
            shutil.rmtree(folder)
        Logger(f"no checkpoint to resume in {folder}: starting from the beginning")
        return 0
    path = checkpoints(folder)[-1]
    state = dict(zip(("model", "optimizer"), sharded.get_state_dict(model, optimizer), strict=True))
    state |= {"step": 0, "rows": 0}
    dcp.load(state, checkpoint_id=path)
    now = rows_per_update(args)
    if state["rows"] != now:
        raise ValueError(f"{path} has {state['rows']} rows per update, now {now}: change --batch_size accordingly")
    sharded.set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    Logger(f"resumed {path}: {state['step']} updates done")
    return state["step"]


def export(args, model, lm_config, tokenizer) -> None:
    """Gather the whole weights on process 0, which writes them as every stage does."""
    whole = sharded.get_model_state_dict(
        model, options=sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    path = weight_path(args.save_dir, args.save_weight, lm_config)
    if dist.get_rank() == 0:
        facts = {"path": str(args.tokenizer_path), "digest": tokenizer_digest(tokenizer)}
        save_weights(path, whole, lm_config, stage=args.stage, tokenizer=facts, data={"path": str(args.data_path)})
    Logger(f"weights: {path}")


def main(args):
    init_environment(args)  # seeds all processes alike: each keeps its part of the same start weights
    if not dist.is_initialized():
        raise ValueError("FSDP needs processes to spread over: torchrun --nproc_per_node 2 scripts/train_fsdp.py ...")
    lm_config = model_config(args)
    model, tokenizer = init_model(lm_config, args.from_weight, args.tokenizer_path, args.save_dir)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    shard(model, torch.device(args.device).type, args.dtype)
    groups = parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))

    rows, _, collate = open_rows(args, tokenizer, PretrainDataset)
    total = args.epochs * math.ceil(len(rows) / rows_per_update(args))
    total = min(total, args.max_steps) if args.max_steps else total
    folder = args.checkpoint_dir / f"{weight_path('', args.save_weight, lm_config).stem}_fsdp"
    done = start(args, folder, model, optimizer)
    for update, window in islice(windows(args, rows, collate, done), total - done):
        for group in optimizer.param_groups:
            group["lr"] = get_lr_with_warmup(update, total, args.learning_rate, round(total * args.warmup_ratio))
        loss = train_window(args, model, optimizer, window)
        if (update + 1) % args.log_interval == 0 or update + 1 == total:
            Logger(f"update {update + 1}/{total} loss:{loss.item():.4f}")
        if (update + 1) % args.save_interval == 0 or update + 1 == total:
            save(args, folder, model, optimizer, update + 1)
    export(args, model, lm_config, tokenizer)
    dist.destroy_process_group()


if __name__ == "__main__":
    with friendly_errors():
        main(parse_args())
