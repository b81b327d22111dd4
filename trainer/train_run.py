"""One training run: everything around `loss = ...` that is the same in every stage, written once.

The stage owns its loop and calls this; this never calls back into a stage:

    for step, batch in run.batches(epoch):              # in order, resumable, on the device, learning rate set
        with run.autocast():
            loss_sum, tokens, aux_loss = compute_loss(run.model, batch)
        run.update(loss_sum, tokens, aux_loss)          # backward; at the end of a window: average, clip, step
        run.log(step)                                   # every --log_interval updates
        run.save(step)                                  # every --save_interval updates, and at the end of an epoch

A *step* is one update of the weights: a window of --accumulation_steps batches on each process. Intervals, the
schedule and the numbers in the log count steps. It takes a Module and a Dataset and knows nothing of what they are.
"""

from __future__ import annotations

import gc
import math
import time
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from model.weights import load_state, save_weights, tokenizer_digest, update_sidecar, weight_path
from trainer.hardware import choose_compile
from trainer.monitor import Monitor, start_wandb
from trainer.optimizer import make_optimizer
from trainer.trainer_utils import (
    Logger,
    SkipBatchSampler,
    StreamShare,
    get_lr_with_warmup,
    get_rank,
    get_rng_state,
    get_world_size,
    is_main_process,
    lm_checkpoint,
    resume_path,
    set_rng_state,
    unwrap,
)

# an update whose gradient is not finite is left out; so many in a row mean that the run is lost
MAX_BAD_UPDATES = 10
FEW_UPDATES = 100


class TrainRun:
    """The optimizer, mixed precision, data order, gradient accumulation, validation, log and checkpoints of one stage.

    Args:
        args: the flags of `trainer.arguments.stage_parser`.
        lm_config: names the files that are written.
        model: what is trained; `run.model` is it again, wrapped for DDP: forward through `run.model`, so that gradients
            are averaged over the processes, and generate with `unwrap(run.model)`.
        dataset: what is trained on; collate turns a list of its items into a batch, a dict of tensors. If it has a
            set_epoch (torch's name for it, on samplers), that is called before each epoch; it may deal its items out
            anew, but not change how many there are. An IterableDataset is taken in its own order.
        val_dataset: held-back rows, or None.
        tokenizer: goes into the sidecar of the weights, by digest.
        params: parameters or parameter groups for AdamW; all of the model's, matrices decayed, if left out.
        export: the callable that gives the state_dict written to --save_dir; the whole model if left out.
        stateful: further objects with state_dict()/load_state_dict() that a resumed run needs back.
    """

    def __init__(
        self,
        args,
        lm_config,
        model,
        dataset,
        collate=None,
        val_dataset=None,
        tokenizer=None,
        params=None,
        export=None,
        **stateful,
    ):
        self.args, self.lm_config, self.dataset, self.val_dataset = args, lm_config, dataset, val_dataset
        self.collate, self.stateful, self.tokenizer = collate, stateful, tokenizer
        self.export = export or (lambda: unwrap(self.model).state_dict())
        self.device_type = torch.device(args.device).type
        self.rank, self.world_size = get_rank(), get_world_size()
        self.optimizer = make_optimizer(args, model, params)
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=args.dtype == "float16")
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

        if isinstance(dataset, IterableDataset):
            args.epochs = 1  # as long as --max_steps
        batches = math.ceil(len(dataset) / (args.batch_size * self.world_size))
        self.batches_per_epoch, self.steps_per_epoch = batches, math.ceil(batches / args.accumulation_steps)
        self.total_steps = self.steps_per_epoch * args.epochs
        if args.max_steps > 0:
            self.total_steps = min(self.total_steps, args.max_steps)
        if self.total_steps < FEW_UPDATES and args.max_steps < 1 and args.batch_size > 1:
            Logger(f"only {self.total_steps:,} updates: a small data set learns more with a smaller --batch_size")
        self.warmup_steps = round(self.total_steps * args.warmup_ratio)

        self.start_epoch = self.start_step = 0
        self.rng_state, self.metrics = None, {}
        state = self._resume(model) if args.from_resume else None
        self.resumed = state is not None
        self._compile(model)
        self.model = model
        if dist.is_initialized():
            ids = [torch.device(args.device).index] if self.device_type == "cuda" else None
            self.model = DistributedDataParallel(model, device_ids=ids)
        self.model.train()
        wandb_id = state["wandb_id"] if state else None
        self.wandb = start_wandb(args, wandb_id) if args.use_wandb and is_main_process() else None
        metrics_path = weight_path(args.save_dir, args.save_weight, lm_config).with_suffix(".metrics.jsonl")
        self.monitor = Monitor(metrics_path, self.total_steps, self.done, is_main_process(), self.wandb)
        self._wrote_weights = False
        self.bad_in_a_row = torch.zeros((), device=args.device)
        self._new_window()
        self._new_log()

    def _compile(self, model) -> None:
        """Compile the model's blocks if that is wanted and pays; what was chosen is kept in args for a resume."""
        args = self.args
        parameters = sum(p.numel() for p in model.parameters())
        flops = 6.0 * parameters * self.total_steps * args.accumulation_steps * self._nominal_tokens
        compiled = choose_compile(args.use_compile, args.device, flops, Logger)
        args.use_compile = str(int(compiled))
        if compiled:
            model.compile_blocks()
            Logger("compiled: the first step takes some ten seconds more (--use_compile 0 turns it off)")

    # --- resuming -----------------------------------------------------------------------------------------------------

    def _resume(self, model) -> dict | None:
        """Put model, optimizer, scaler, position and random state back to where the last checkpoint left them."""
        args, path = self.args, resume_path(self.lm_config, self.args.save_weight, self.args.checkpoint_dir)
        state = lm_checkpoint(self.lm_config, args.save_weight, save_dir=args.checkpoint_dir)
        if state is None:
            Logger(f"no checkpoint at {path}: starting from the beginning")
            return None
        saved = state["args"]
        self._check_resumable(path, state)
        if "dtype" in args.chosen:  # what `auto` meant when the run began
            args.dtype = saved["dtype"]
            self.scaler = torch.amp.GradScaler(self.device_type, enabled=args.dtype == "float16")
        if "use_compile" in args.chosen:
            args.use_compile = saved.get("use_compile", "0")
        load_state(model, state["model"], path)
        stated = [
            {name: group[name] for name in ("initial_lr", "weight_decay")} for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, stated, strict=True):
            group.update(values)  # what the command line says now, not what it said then
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for name, obj in self.stateful.items():
            obj.load_state_dict(state[name])
        self.start_epoch, self.start_step, self.rng_state = state["epoch"], state["step"], state["rng"]
        Logger(f"resumed {path.name}: epoch {self.start_epoch + 1}, step {self.start_step}/{self.steps_per_epoch}")
        return state

    def _check_resumable(self, path, state: dict) -> None:
        """Say what has changed since the checkpoint; raise ValueError where its place in the data means nothing now."""
        args, saved = self.args, state["args"]
        for name in ("epochs", "max_steps", "learning_rate", "warmup_ratio", "weight_decay", "grad_clip"):
            if saved[name] != getattr(args, name):
                Logger(f"note: --{name} was {saved[name]} before the resume and is {getattr(args, name)} from now on")
        for name in ("batch_size", "accumulation_steps", "max_seq_len", "packing", "seed", "optimizer"):
            if saved.get(name) != getattr(args, name):
                why = "its state fits no other" if name == "optimizer" else "rows would be trained twice or never"
                raise ValueError(
                    f"{path} was written with --{name} {saved.get(name)}, now it is {getattr(args, name)}: {why}. "
                    f"Pass --{name} {saved.get(name)}, or start anew with --from_resume 0"
                )
        then = {**(state.get("data") or {}), "processes": state["world_size"]}
        now = {**self._data, "processes": self.world_size}
        changed = [f"{name} {then.get(name)} (now {value})" for name, value in now.items() if then.get(name) != value]
        if changed:
            raise ValueError(
                f"{path} was written with {', '.join(changed)}: continue with the same data and processes, or start "
                "anew with --from_resume 0 --from_weight"
            )

    @property
    def _rows(self) -> int:
        """How many rows there are to go through; 0 for a stream, which has no end."""
        return 0 if isinstance(self.dataset, IterableDataset) else len(self.dataset)

    @property
    def _data(self) -> dict:
        """What the data counts, rows and tokens among it: the same only for the same data."""
        return {"rows": self._rows} | getattr(self.dataset, "report", {})

    @property
    def done(self) -> int:
        """Updates made before this process began."""
        return self.start_epoch * self.steps_per_epoch + self.start_step

    # --- the data, in order -------------------------------------------------------------------------------------------

    def epochs(self):
        return range(self.start_epoch, math.ceil(self.total_steps / self.steps_per_epoch))

    def _sampler(self, epoch: int, skip: int) -> SkipBatchSampler:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        if isinstance(self.dataset, IterableDataset):
            order = range(len(self.dataset))
        else:
            generator = torch.Generator().manual_seed(self.args.seed + epoch)
            order = torch.randperm(len(self.dataset), generator=generator).tolist()
        return SkipBatchSampler(order, self.args.batch_size, skip, self.rank, self.world_size)

    def _loader(self, dataset, sampler) -> DataLoader:
        workers = self.args.num_workers
        if workers < 0:
            workers = 2 if self.device_type == "cuda" else 0
        how = {"batch_sampler": sampler, "num_workers": workers}
        if isinstance(dataset, IterableDataset):  # one process reads it: several would each read it
            dataset, how = StreamShare(dataset, sampler), {"batch_size": None, "num_workers": min(workers, 1)}
        # a generator of its own: the loader would otherwise draw from the model's random stream
        return DataLoader(
            dataset,
            collate_fn=self.collate,
            pin_memory=self.device_type == "cuda",
            generator=torch.Generator(),
            **how,
        )

    def batches(self, epoch: int):
        """Yield (step, batch): the updates of this epoch counted from 1; those made before a resume are skipped."""
        args, start = self.args, self.start_step if epoch == self.start_epoch else 0
        sampler = self._sampler(epoch, start * args.accumulation_steps)
        if self.rng_state is not None:
            set_rng_state(self.rng_state[self.rank])
            self.rng_state = None
        self.epoch = epoch
        for number, batch in enumerate(self._loader(self.dataset, sampler), start=sampler.skip_batches):
            self.step = number // args.accumulation_steps + 1
            done = epoch * self.steps_per_epoch + self.step - 1
            if done >= self.total_steps:  # --max_steps
                return
            self.is_filler = sampler.is_filler(number)
            self._set_stance(sampler, number)
            self.closes_window = (number + 1) % args.accumulation_steps == 0 or number + 1 == self.batches_per_epoch
            for group in self.optimizer.param_groups:
                group["lr"] = get_lr_with_warmup(done, self.total_steps, group["initial_lr"], self.warmup_steps)
            if isinstance(self.model, DistributedDataParallel):
                self.model.require_backward_grad_sync = self.closes_window  # average gradients once per update
            yield self.step, to_device(batch, args.device)

    def _set_stance(self, sampler: SkipBatchSampler, number: int) -> None:
        """Compiled code is for batches of the full size: a smaller last one would be compiled for by itself."""
        if self.args.use_compile == "1":
            torch.compiler.set_stance("default" if sampler.is_full(number) else "force_eager")

    # --- the update ---------------------------------------------------------------------------------------------------

    def autocast(self):
        if self.args.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device_type, dtype=getattr(torch, self.args.dtype))

    def _new_window(self) -> None:
        self.window_tokens = torch.zeros((), device=self.args.device)

    def update(self, loss_sum: torch.Tensor, tokens: torch.Tensor, aux_loss: torch.Tensor) -> None:
        """Add a batch's gradient to its window, and update the weights when the window closes.

        The gradient of a window is that of the mean loss over all its valid tokens, on all processes: the same as one
        big batch's, however the tokens are spread. How many they are is known only at the end, so losses are summed and
        the sum's gradient is divided then.

        Args:
            loss_sum: scalar, the summed loss of this batch's valid tokens; tokens: scalar, their number.
            aux_loss: scalar, a mean that counts by those tokens (a balance loss); zero where there is none.
        """
        if self.is_filler:
            loss_sum, tokens = loss_sum * 0, tokens * 0
        # a constant of about the right size keeps fp16's summed gradients in range until the exact number is known
        self.backward((loss_sum + aux_loss * tokens) / self._nominal_tokens)
        self.window_tokens += tokens
        self.log_sums += torch.stack([loss_sum.detach().float(), aux_loss.detach() * tokens, tokens.float()])
        if not self.closes_window:
            return
        if dist.is_initialized():
            dist.all_reduce(self.window_tokens)
        self.optimizer_step(gradient_scale=self._nominal_tokens * self.world_size / self.window_tokens.clamp(min=1))
        self._new_window()

    @property
    def _nominal_tokens(self) -> float:
        return float(self.args.batch_size * self.args.max_seq_len)

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def optimizer_step(self, gradient_scale: torch.Tensor | None = None) -> None:
        """Scale the gradients, clip them, step, forget them. Nothing here waits for a CUDA GPU."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradient_scale is not None:
            torch._foreach_mul_([p.grad for p in parameters], gradient_scale)
        self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.args.grad_clip)
        finite = torch.isfinite(self.grad_norm)
        if self.device_type == "cuda" and not self.scaler.is_enabled():
            # the fused kernel leaves weights and moments alone where this is 1, without anyone waiting for the number
            self.optimizer.found_inf = (~finite).float()
        elif not self.scaler.is_enabled() and not finite:
            self.optimizer.zero_grad(set_to_none=True)  # nothing to step with
        self.bad_in_a_row = (self.bad_in_a_row + 1) * ~finite
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.monitor.advance()

    # --- validation ---------------------------------------------------------------------------------------------------

    def val_batches(self):
        """The held-back rows in order, shared over the processes, on the device; nothing if there are none."""
        if self.val_dataset is None:
            return
        sampler = SkipBatchSampler(range(len(self.val_dataset)), self.args.batch_size, 0, self.rank, self.world_size)
        for number, batch in enumerate(self._loader(self.val_dataset, sampler)):
            self.is_filler = sampler.is_filler(number)
            self._set_stance(sampler, number)
            yield to_device(batch, self.args.device)

    @contextmanager
    def evaluating(self):
        """No gradients, eval mode, and a sum to add each batch's loss to; at the end its mean is logged.

        with run.evaluating() as total:
            for batch in run.val_batches():
                with run.autocast():
                    total.add(*compute_loss(run.model, batch))
        """
        total, began = LossSum(self), time.monotonic()
        self.model.eval()
        try:
            with torch.no_grad():
                yield total
        finally:
            self.model.train()
        if self.val_dataset is not None:
            loss = total.mean()
            self.metrics |= {"val_loss": loss, "val_ppl": perplexity(loss)}
            line = f"validation: loss:{loss:.4f} ppl:{perplexity(loss):.2f} ({time.monotonic() - began:.0f} s)"
            self.monitor.record(line, epoch=self.epoch + 1, val_loss=loss, val_ppl=perplexity(loss))
        self._log_began += time.monotonic() - began

    # --- the record ---------------------------------------------------------------------------------------------------

    def _new_log(self) -> None:
        self.log_sums = torch.zeros(3, device=self.args.device)  # loss, balance loss * tokens, tokens
        self._log_began = time.monotonic()

    def log(self, step: int, **extra: float) -> None:
        """Every --log_interval steps: mean loss since the last line, over all processes, and the speed."""
        if not self.closes_window or (step % self.args.log_interval and not self._ends_epoch(step)):
            return
        sums = self.log_sums
        if dist.is_initialized():
            dist.all_reduce(sums)
        loss, aux_loss, tokens = sums.tolist()
        mean = loss / max(tokens, 1)
        bad = int(self.bad_in_a_row)
        if not math.isfinite(mean) or bad >= MAX_BAD_UPDATES:
            raise ValueError(
                f"epoch {self.epoch + 1}, step {step}: the loss is {mean}, and the gradient was not finite in the last "
                f"{bad} updates, which were left out. Lower --learning_rate; the last save is in {self.args.save_dir}"
            )
        speed = tokens / max(time.monotonic() - self._log_began, 1e-9)
        lr = self.optimizer.param_groups[0]["lr"]
        self.metrics |= {"loss": mean, "ppl": perplexity(mean), "tokens_per_second": speed}
        parts = {"loss": f"{mean:.4f}", "ppl": f"{perplexity(mean):.2f}", "lr": f"{lr:.3e}"}
        if aux_loss:
            parts["aux_loss"] = f"{aux_loss / tokens:.4f}"
        parts |= {name: f"{value:.4g}" for name, value in extra.items()}
        parts |= {"tokens/s": f"{speed:,.0f}", "ETA": f"{self.monitor.minutes_left():.1f}min"}
        self.monitor.record(
            f"Epoch:[{self.epoch + 1}/{self.args.epochs}]({step}/{self.steps_per_epoch}) "
            + " ".join(f"{name}:{value}" for name, value in parts.items()),
            epoch=self.epoch + 1,
            step=step,
            loss=mean,
            ppl=perplexity(mean),
            aux_loss=aux_loss / max(tokens, 1),
            lr=lr,
            grad_norm=float(self.grad_norm),
            tokens=tokens,
            tokens_per_second=speed,
            eta_minutes=self.monitor.minutes_left(),
            **extra,
        )
        self._new_log()

    def _ends_epoch(self, step: int) -> bool:
        return step == self.steps_per_epoch or self.epoch * self.steps_per_epoch + step == self.total_steps

    def save(self, step: int) -> None:
        """Every --save_interval steps and at the end of an epoch: the weights, and the state to resume from."""
        if not self.closes_window or (step % self.args.save_interval and not self._ends_epoch(step)):
            return
        self._save_state(self.epoch, step)
        self._save_weights()

    def _save_state(self, epoch: int, step: int) -> None:
        rng = [get_rng_state()]
        if dist.is_initialized():
            rng = [None] * self.world_size
            dist.all_gather_object(rng, get_rng_state())
        if is_main_process():
            saved = {
                "rng": rng,
                "args": plain(self.args),
                "data": self._data,
                "rows": self._rows,
                "scaler": self.scaler,
            }
            lm_checkpoint(
                self.lm_config,
                self.args.save_weight,
                self.model,
                self.optimizer,
                epoch,
                step,
                self.wandb,
                self.args.checkpoint_dir,
                **saved,
                **self.stateful,
            )

    def _save_weights(self) -> None:
        if not is_main_process():
            return
        args = self.args
        path = weight_path(args.save_dir, args.save_weight, self.lm_config)
        keep_previous = not self.resumed and not self._wrote_weights
        data = {"path": str(args.data_path), "rows": self._rows, **getattr(self.dataset, "report", {})}
        tokenizer = {}
        if self.tokenizer is not None:
            tokenizer = {"path": str(args.tokenizer_path), "digest": tokenizer_digest(self.tokenizer)}
        save_weights(
            path,
            self.export(),
            self.lm_config,
            args.save_dtype,
            keep_previous,
            stage=args.stage,
            tokenizer=tokenizer,
            data=data,
            arguments=plain(args),
            metrics=self.metrics,
        )
        self._wrote_weights = True

    def finish(self) -> None:
        """Put the last validation into the sidecar, say where the weights are, leave the process group."""
        path = weight_path(self.args.save_dir, self.args.save_weight, self.lm_config)
        if not self._wrote_weights:  # a run that was resumed after its end
            self._save_weights()
        elif is_main_process():
            update_sidecar(path, metrics=self.metrics)
        self.monitor.close()
        if self.args.use_compile == "1":
            torch.compiler.set_stance("default")
        Logger(f"weights: {path}")
        if dist.is_initialized():
            dist.barrier()
            # the wrapper holds the group's threads: it goes first, or they may outlive the group and abort the exit
            self.model = unwrap(self.model)
            gc.collect()
            dist.destroy_process_group()


class LossSum:
    """The summed loss and its number of tokens over the batches of a validation, on all processes."""

    def __init__(self, run: TrainRun):
        self.run, self.sums = run, torch.zeros(2, device=run.args.device)

    def add(self, loss_sum: torch.Tensor, tokens: torch.Tensor, aux_loss: torch.Tensor | None = None) -> None:
        if not self.run.is_filler:
            self.sums += torch.stack([loss_sum.float(), tokens.float()])

    def mean(self) -> float:
        sums = self.sums
        if dist.is_initialized():
            dist.all_reduce(sums)
        return (sums[0] / sums[1].clamp(min=1)).item()


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def plain(args) -> dict:
    """The arguments as JSON and weights_only=True can hold them."""
    return {
        name: value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
        for name, value in vars(args).items()
    }


def to_device(batch, device):
    """Move the tensors of a (nested) batch to the device; leave strings alone."""
    if isinstance(batch, torch.Tensor):
        # from pinned memory only: elsewhere the copy could be read before it is done
        return batch.to(device, non_blocking=batch.is_pinned())
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [to_device(value, device) for value in batch]
    return batch
