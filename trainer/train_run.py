"""One training run: everything around `loss = ...` that is the same in every stage, written once.

The stage owns its loop and calls this; this never calls back into a stage:

    with TrainRun(args, lm_config, model, dataset, collate, val_dataset, tokenizer) as run:
        for epoch in run.epochs():
            for step, batch in run.batches(epoch):      # in order, resumable, on the device, learning rate set
                with run.attempt():                     # out of memory: the same window again, in smaller pieces
                    with run.autocast():
                        loss_sum, tokens, aux_loss = compute_loss(run.model, batch)
                    run.update(loss_sum, tokens, aux_loss)  # backward; at the end of a window: average, clip, step
                run.log(step)                           # every --log_interval updates
                if run.evaluates(step):                 # every --eval_interval updates, and at the end of an epoch
                    validate(run)
                run.save(step)                          # every --save_minutes, at the end of an epoch, when stopped

A *step* is one update of the weights: a window of --accumulation_steps batches on each process. Intervals, the
schedule and the numbers in the log count steps. It takes a Module and a Dataset and knows nothing of what they are.
"""

from __future__ import annotations

import gc
import math
import signal
import sys
import time
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from model.weights import config_dict, load_state
from trainer import memory, resume
from trainer.arguments import ROOT
from trainer.checkpoint import is_minimind, minimind_optimizer
from trainer.guard import NumberGuard, Update
from trainer.hardware import choose_compile
from trainer.logbook import Logbook
from trainer.optimizer import freeze, make_optimizer
from trainer.order import DataOrder, KeepRows, make_loader, to_device
from trainer.record import code_version
from trainer.resume import plain
from trainer.saving import Saver
from trainer.schedule import describe_schedule, get_lr_with_warmup, warmup_steps_of
from trainer.stopping import EarlyStopping, StopSignals
from trainer.trainer_utils import (
    Logger,
    SkipBatchSampler,
    add_up,
    agree,
    average_gradients,
    from_main,
    gather,
    get_rank,
    get_rng_state,
    get_world_size,
    is_main_process,
    lm_checkpoint,
    lost_peer,
    set_rng_state,
    setup_seed,
    unwrap,
)
from trainer.validation import LossSum, perplexity

FEW_UPDATES = 100
SHOWN_ROWS = 8


class TrainRun:
    """The optimizer, mixed precision, data order, gradient accumulation, validation, log and checkpoints of one stage.

    Used as a context manager: leaving it ends the record of the run, whatever happened.

    Args:
        args: the flags of `trainer.arguments.stage_parser`.
        lm_config: names the files that are written.
        model: what is trained; `run.model` is it again, wrapped for DDP: forward through `run.model`, so that gradients
            are averaged over the processes, and generate with `unwrap(run.model)`.
        dataset: what is trained on; collate turns a list of its items into a batch, a dict of tensors. If it has a
            set_epoch (torch's name for it, on samplers), that is called before each epoch; it may deal its items out
            anew, but not change how many there are. An IterableDataset is taken in its own order.
        val_dataset: held-back rows, or None.
        tokenizer: goes into the sidecar of the weights, by digest, and says how many bytes a token stands for.
        params: parameters or parameter groups for AdamW; all of the model's, matrices decayed, if left out.
        export: the callable that gives the state_dict written to --save_dir; the whole model if left out.
        stateful: further objects with state_dict()/load_state_dict() that a resumed run needs back.

    Attributes:
        updates: made so far, those before a resume among them. folder: the run's directory, None off the main process.
        due: what an evaluation is to look at now: "val", "regression".
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
        self.collate, self.tokenizer = collate, tokenizer
        self.export = export or (lambda: unwrap(self.model).state_dict())
        self.device_type = torch.device(args.device).type
        self.rank, self.world_size = get_rank(), get_world_size()
        if args.patience and val_dataset is None:
            raise ValueError("--patience looks at a held-back loss: hold rows back by --val_ratio or --val_path")
        if args.label_smoothing and not hasattr(model, "label_smoothing"):
            raise ValueError(f"--label_smoothing: {type(model).__name__} knows no such thing, pass 0")
        if args.label_smoothing:
            model.label_smoothing = args.label_smoothing
        if frozen := freeze(model, args.freeze):
            Logger(f"frozen: {len(frozen)} parameters, {frozen[0]} among them")
        self.optimizer = make_optimizer(args, model, params)
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=args.dtype == "float16")
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.guard = NumberGuard(scaled=self.scaler.is_enabled())
        self.early = EarlyStopping(args.patience, args.min_delta)
        self.stateful = stateful | {"guard": self.guard, "early": self.early}
        self.saver = Saver(args, lm_config, tokenizer, self._data)
        self.code = code_version(ROOT)
        self.start_epoch = self.start_step = self.updates = 0
        self.rng_state, self.pieces, self.due = None, 1, set()
        self.typed = [args.batch_size, args.accumulation_steps]
        if isinstance(dataset, IterableDataset):
            args.epochs = 1  # as long as --max_steps
        state = self._read_checkpoint() if args.from_resume else None
        self._plan(state)
        if state is not None:
            self._restore(model, state)
        self._say_what_is_ahead(model)
        self._compile(model)
        self.model = model
        if dist.is_initialized():
            ids = [torch.device(args.device).index] if self.device_type == "cuda" else None
            self.model = DistributedDataParallel(model, device_ids=ids)
        self.model.train()
        from_main(self.saver.prepare)
        self._begin_record(state)
        if state is None:
            from_main(self.saver.checkpoints.set_aside)
        self._begin_window()
        self.signals = StopSignals(Logger)

    def _plan(self, state: dict | None) -> None:
        """The order of the data and how many updates there are; a checkpoint settles how many rows make one."""
        args = self.args
        rows = resume.rows_per_update(args, self.world_size)
        if state is not None and not is_minimind(state):
            rows = resume.keep_rows_per_update(state["path"], state, args, self.world_size, Logger)
        self.order = DataOrder(args, self.dataset, rows)
        if self.order.is_stream and len(self.dataset) != rows * args.max_steps:
            begun = f"it was begun by {state['world_size']}" if state else f"it has {len(self.dataset):,} rows"
            raise ValueError(f"a stream is continued by as many processes as before: {begun}")
        self.batches_per_epoch, self.steps_per_epoch = self.order.batches, self.order.updates
        self.total_steps = self.steps_per_epoch * args.epochs
        if args.max_steps > 0:
            self.total_steps = min(self.total_steps, args.max_steps)
        if self.total_steps < FEW_UPDATES and args.max_steps < 1 and args.batch_size > 1:
            Logger(f"only {self.total_steps:,} updates: a small data set learns more with a smaller --batch_size")
        self.warmup_steps = warmup_steps_of(args, self.total_steps)

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

    def _say_what_is_ahead(self, model) -> None:
        """The schedule, the memory and the disk space that the run will take, before its first step."""
        args = self.args
        Logger(describe_schedule(args, self.total_steps, self.updates))
        every = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
        estimate = memory.estimate(self.lm_config, args, trained, every)
        Logger(memory.describe(estimate, args.device))
        for warning in (memory.warning(estimate, args.device), memory.disk_warning(every, args)):
            if warning:
                Logger(warning)

    # --- resuming -----------------------------------------------------------------------------------------------------

    def _read_checkpoint(self) -> dict | None:
        """The state to go on from, on all processes; says what it is and what has changed since."""
        state = from_main(self._read)  # another machine's file system may not hold it
        if state is None:
            Logger(f"no checkpoint at {self.saver.checkpoints.path}: starting from the beginning")
        elif not is_minimind(state):
            now = config_dict(self.lm_config)
            resume.check_resumable(state["path"], state, self.args, self._data, now, self.code, Logger)
        return state

    def _read(self) -> dict | None:
        found = self.saver.checkpoints.read()
        if found is None:
            return None
        state, path = found
        return state | {"path": path, "age": time.time() - path.stat().st_mtime}

    def _restore(self, model, state: dict) -> None:
        """Put model, optimizer, scaler, position and random state back to where the checkpoint left them."""
        args, path = self.args, state["path"]
        if is_minimind(state):
            self._restore_minimind(model, state)
            return
        saved = state["args"]
        if "dtype" in args.chosen:  # what `auto` meant when the run began
            args.dtype = saved["dtype"]
            self.scaler = torch.amp.GradScaler(self.device_type, enabled=args.dtype == "float16")
            self.guard.scaled = self.scaler.is_enabled()
        if "use_compile" in args.chosen:
            args.use_compile = saved["use_compile"]
        load_state(model, state["model"], path)
        self._load_optimizer(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for name, obj in self.stateful.items():
            if name in state:
                obj.load_state_dict(state[name])
            else:
                Logger(f"note: {path.name} holds no state of {name}, which begins anew")
        self.start_epoch, self.start_step, self.rng_state = state["epoch"], state["step"], state["rng"]
        self.updates = self.start_epoch * self.steps_per_epoch + self.start_step
        self.saver.resumed, self.saver.saved_update = True, self.updates
        self.pieces = state.get("pieces", 1)
        Logger(resume.describe(path, state, self.start_step, self.steps_per_epoch))
        if self.early.is_over:
            Logger(f"the run had stopped early, after {self.early.without_gain} validations without gain (--patience)")

    def _restore_minimind(self, model, state: dict) -> None:
        """Weights, moments and the place in the epoch, as far as MiniMind's file says."""
        args, path = self.args, state["path"]
        load_state(model, {name: tensor.float() for name, tensor in state["model"].items()}, path)
        self._load_optimizer(minimind_optimizer(state, model, self.optimizer))
        documents = self._data.get("documents") or self._data["rows"]
        share = resume.minimind_share(path, state, documents, args.batch_size, Logger)
        self.start_epoch = min(state["epoch"], args.epochs - 1)
        self.start_step = int(share * self.steps_per_epoch)
        self.updates = self.start_epoch * self.steps_per_epoch + self.start_step

    def _load_optimizer(self, content: dict) -> None:
        """Its state, but the rates and the decay that the command line says now."""
        stated = [
            {name: group[name] for name in ("initial_lr", "weight_decay")} for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(content)
        for group, values in zip(self.optimizer.param_groups, stated, strict=True):
            group.update(values)

    @property
    def _data(self) -> dict:
        """What the data counts, rows and tokens among it, and its digest: the same only for the same data."""
        digest = getattr(self.dataset, "digest", None)
        rows = 0 if isinstance(self.dataset, IterableDataset) else len(self.dataset)  # a stream has no end
        return {"rows": rows} | getattr(self.dataset, "report", {}) | ({"digest": digest} if digest else {})

    # --- the data, in order -------------------------------------------------------------------------------------------

    def epochs(self):
        for epoch in range(self.start_epoch, math.ceil(self.total_steps / self.steps_per_epoch)):
            if self.early.is_over:
                return
            yield epoch

    def batches(self, epoch: int):
        """Yield (step, batch): the updates of this epoch counted from 1; those made before a resume are skipped."""
        start = self.start_step if epoch == self.start_epoch else 0
        self.epoch, self.sampler = epoch, self.order.sampler(epoch, start)
        collate = KeepRows(self.collate) if self.args.oom_policy == "shrink" else self.collate
        self._restore_rng()
        loader = self.order.load(self.sampler, collate)
        for step in range(start + 1, self.steps_per_epoch + 1):
            done = epoch * self.steps_per_epoch + step - 1
            if done >= self.total_steps or self.early.is_over:  # --max_steps, --patience
                return
            self.step = step
            for group in self.optimizer.param_groups:
                group["lr"] = get_lr_with_warmup(
                    done,
                    self.total_steps,
                    group["initial_lr"],
                    self.warmup_steps,
                    self.args.lr_schedule,
                    self.args.min_lr_ratio,
                )
            for batch in self._window(loader):
                yield self.step, batch

    def _window(self, loader):
        """The batches of one update; all of them again, in smaller pieces, where memory ran out."""
        last, fetched = self.order.last_batch(self.step), []
        while True:
            self.failed, self._why_failed, self._losses = False, "in another process", []
            self._begin_window()
            for place in range(self.order.batches_per_update):
                if place == len(fetched):
                    fetched.append(self._fetch(loader))
                number, content = fetched[place]
                pieces = self._cut(content)
                for i, piece in enumerate(pieces):
                    self.number, self.is_filler = number, self.sampler.is_filler(number)
                    self.closes_window = number == last and i == len(pieces) - 1
                    self._prepare_model(self.sampler.is_full(number) and len(pieces) == 1)
                    yield to_device(piece, self.args.device)
                    if self.failed:
                        break
                if self.failed or number == last:
                    break
            if not self.failed:
                return
            self._shrink()

    def _fetch(self, loader):
        began = time.monotonic()
        item = next(loader)
        self.book.data_wait += time.monotonic() - began
        return item

    def _cut(self, content) -> list:
        """The batch, or so many smaller ones of its rows."""
        if self.args.oom_policy != "shrink":
            return [content]
        rows, batch = content
        if self.pieces == 1:
            return [batch]
        size = math.ceil(len(rows) / self.pieces)
        return [self.collate(rows[at : at + size]) for at in range(0, len(rows), size)]

    def _prepare_model(self, full: bool) -> None:
        self._set_stance(full)
        if isinstance(self.model, DistributedDataParallel):
            # gradients are averaged once per update; in the shrink mode only when all processes have got through it
            self.model.require_backward_grad_sync = self.closes_window and self.args.oom_policy != "shrink"
        if self.book.activations is not None and self.closes_window and self._closes(self.args.log_interval):
            self.book.activations.start()

    def _set_stance(self, full: bool) -> None:
        """Compiled code is for batches of the full size: a smaller last one would be compiled for by itself."""
        if self.args.use_compile == "1":
            torch.compiler.set_stance("default" if full else "force_eager")

    def _restore_rng(self) -> None:
        """Go on in the random stream of the checkpoint; a process that was not there then begins one of its own."""
        if self.rng_state is None:
            return
        if self.rank < len(self.rng_state):
            set_rng_state(self.rng_state[self.rank])
        else:
            setup_seed(self.args.seed + self.rank + self.updates)
        self.rng_state = None

    # --- the update ---------------------------------------------------------------------------------------------------

    def autocast(self):
        if self.args.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device_type, dtype=getattr(torch, self.args.dtype))

    def _begin_window(self) -> None:
        self.window_tokens = torch.zeros((), device=self.args.device)
        self.guard.new_window()

    @contextmanager
    def attempt(self):
        """Around forward pass and update: where the GPU's memory runs out, --oom_policy decides.

        raise: MemoryError, which names the flags that save memory. shrink: the window begins again in smaller pieces,
        on all processes; its sums, and so its gradient, are the same.
        """
        self._agreed = False
        try:
            yield
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
            # an update that has begun, here or in other processes, cannot be taken back
            if self.args.oom_policy == "raise" or self._agreed:
                raise MemoryError(self._out_of_memory(error)) from error
            for tensor in self._losses:  # the stage's names hold them, and they the graph of what did not fit
                tensor.detach_()
            self._why_failed, self.failed = str(error).splitlines()[0], True
            if not self._agreed:
                agree(True)

    def _out_of_memory(self, error) -> str:
        size = f"{self.args.batch_size} rows of {self.args.max_seq_len} tokens in {self.args.dtype}"
        return f"out of memory at step {self.step}, {size}: {memory.advice(self.args)} ({str(error).splitlines()[0]})"

    def _shrink(self) -> None:
        """After a window that did not fit: forget its gradients and cut batches into twice as many pieces."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.device_type == "cuda":
            torch.cuda.empty_cache()  # blocks of the large size would not serve the small one
        if self.pieces >= self.args.batch_size:
            raise MemoryError(self._out_of_memory(f"one row at a time does not fit: {self._why_failed}"))
        self.pieces *= 2
        self.book.counts["shrunk"] += 1
        self.monitor.event(
            f"out of memory at step {self.step}: each batch in {self.pieces} pieces from now on ({self._why_failed})",
            "out_of_memory",
            pieces=self.pieces,
        )

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
        self._losses = [tensor for tensor in (loss_sum, aux_loss) if tensor.requires_grad]
        # a constant of about the right size keeps fp16's summed gradients in range until the exact number is known
        self.backward((loss_sum + aux_loss * tokens) / self._nominal_tokens)
        self.window_tokens += tokens
        self.guard.add(self.number, loss_sum, aux_loss, tokens.float(), not self.is_filler)
        if not self.closes_window:
            return
        if self.args.oom_policy == "shrink":
            self._agreed = True
            (self.failed,) = agree(False)
            if self.failed:
                return
            average_gradients([p for group in self.optimizer.param_groups for p in group["params"]])
        add_up(self.window_tokens)
        self.optimizer_step(gradient_scale=self._nominal_tokens * self.world_size / self.window_tokens.clamp(min=1))
        self._begin_window()

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
        infinite = ~torch.isfinite(self.grad_norm)
        left_out = infinite if gradient_scale is None else infinite | (self.window_tokens == 0)
        if self.device_type == "cuda" and not self.scaler.is_enabled():
            # the fused kernel leaves weights and moments alone where this is 1, without anyone waiting for the number
            self.optimizer.found_inf = left_out.float()
        elif left_out:
            self.optimizer.zero_grad(set_to_none=True)  # nothing to step with
        self.guard.close(self.updates + 1, self.grad_norm, left_out)
        probe = self.book.weights_probe if self._closes(self.args.log_interval) else None
        if probe is not None:
            probe.before()
        self.scaler.step(self.optimizer)
        if probe is not None:
            self.book.weights_moved = probe.after()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        self.monitor.advance()

    # --- validation ---------------------------------------------------------------------------------------------------

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after this step; run.due says of what."""
        self.due = set()
        if not self.closes_window or self.failed:
            return False
        interval, args = self.args.eval_interval, self.args
        if self._ends_epoch(step) or (interval > 0 and self.updates % interval == 0):
            self.due.add("val")
        if args.regression_eval and (
            (args.regression_interval > 0 and self.updates % args.regression_interval == 0)
            or (args.regression_interval == 0 and "val" in self.due)
            or self.updates == self.total_steps
        ):
            self.due.add("regression")
        if self.due:
            self.book.begin_aside()  # until the save of this step
        return bool(self.due)

    def val_batches(self):
        """The held-back rows in order, shared over the processes, on the device; nothing if that is not due."""
        if self.val_dataset is None or "val" not in self.due:
            return
        sampler = SkipBatchSampler(range(len(self.val_dataset)), self.args.batch_size, 0, self.rank, self.world_size)
        for number, batch in enumerate(make_loader(self.args, self.val_dataset, sampler, self.collate)):
            self.total.is_filler = sampler.is_filler(number)
            self._set_stance(sampler.is_full(number))
            self.total.count_bytes(batch)
            yield to_device(batch, self.args.device)

    @contextmanager
    def evaluating(self):
        """No gradients, eval mode, and a sum to add each batch's loss to; at the end its mean is logged.

        The weights are kept as `{save_weight}_best` where the loss is the lowest so far.

        with run.evaluating() as total:
            for batch in run.val_batches():
                with run.autocast():
                    total.add(*compute_loss(run.model, batch))
        """
        self.total = LossSum(self.tokenizer)
        self.model.eval()
        began = time.monotonic()
        try:
            with torch.no_grad():
                yield self.total
        finally:
            self.model.train()
        if self.val_dataset is not None and "val" in self.due:
            self._judge(*self.total.mean(), time.monotonic() - began)

    def _judge(self, loss: float, bits_per_byte: float | None, seconds: float) -> None:
        """Log a held-back loss, keep the weights if it is the best so far, and see whether the run should go on."""
        values = {"val_loss": loss, "val_ppl": perplexity(loss)}
        if bits_per_byte is not None:
            values["val_bits_per_byte"] = bits_per_byte
        best = self.early.update(loss)
        lowest = f"the lowest was {self.early.best:.4f} at {self.early.best_update:,}"
        self.book.metrics |= values
        known = f" bits/byte:{bits_per_byte:.3f}" if bits_per_byte is not None else ""
        self.monitor.record(
            f"validation: loss:{loss:.4f} ppl:{perplexity(loss):.2f}{known} ({seconds:.0f} s), "
            + ("the lowest so far" if best else lowest),
            epoch=self.epoch + 1,
            **values,
        )
        if best and from_main(self._save_weights, self.saver.best_name):
            self.early.keep(loss, self.updates)
        if self.early.is_over:
            self.monitor.event(
                f"stopping early: the held-back loss has not fallen by more than {self.args.min_delta:g} in "
                f"{self.early.without_gain} validations; the best weights are {self.saver.best_name}, of update "
                f"{self.early.best_update:,}",
                "stopped_early",
            )

    # --- the record ---------------------------------------------------------------------------------------------------

    def _begin_record(self, state: dict | None) -> None:
        """The run's directory, and what is written there first."""
        name = self.saver.path(self.args.save_weight).stem
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.book = Logbook(self.args, name, unwrap(self.model), parameters, self.total_steps, self.updates, state)
        self.folder, self.monitor = self.book.folder, self.book.monitor
        self.book.begin(self.lm_config, self._data, getattr(self.dataset, "stats", []), self.code)
        if state is not None:
            self.monitor.event(None, "resumed", processes=self.world_size)

    def _closes(self, interval: int) -> bool:
        """Whether this batch ends a step at which something is done every `interval` steps, and at an epoch's end."""
        due = (interval > 0 and self.step % interval == 0) or self._ends_epoch(self.step)
        return self.closes_window and not self.failed and due

    def _ends_epoch(self, step: int) -> bool:
        return step == self.steps_per_epoch or self.epoch * self.steps_per_epoch + step == self.total_steps

    def log(self, step: int, **extra: float) -> None:
        """Every --log_interval steps: mean loss since the last line, over all processes, and the speed."""
        logs = self._closes(self.args.log_interval)
        closes = self.closes_window and not self.failed  # alike on all processes, as what follows must be
        if logs or (closes and self.updates % self.args.max_bad_updates == 0):
            self._read_numbers()
        if not logs:
            return
        place = f"Epoch:[{self.epoch + 1}/{self.args.epochs}]({step}/{self.steps_per_epoch})"
        lr = self.optimizer.param_groups[0]["lr"]
        self.book.log(place, self.guard.unlogged, lr, extra, epoch=self.epoch + 1, step=step)
        self.guard.unlogged = []

    def _read_numbers(self) -> None:
        """Fetch the numbers of the updates since the last time, say what is wrong with them, keep them for the log."""
        updates = self.guard.read(add_up)
        self.guard.unlogged += updates
        self._report(updates)

    def _report(self, updates: list[Update]) -> None:
        """Say what went wrong since the last line; raise ValueError where nothing goes right any more."""
        spikes = self.guard.judge(updates)
        for update in (update for update in updates if update.bad):
            rows = self._rows_of(update)
            more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
            self.monitor.event(
                f"update {update.number:,} left out: the loss is {update.mean:.4g}, the norm of the gradient "
                f"{update.grad_norm:.4g}. It was made of {'; '.join(rows[:SHOWN_ROWS])}{more}",
                "bad_update",
                number=update.number,
                rows=rows,
            )
        for update, before in spikes:
            self.monitor.event(
                f"the loss jumped to {update.mean:.4f} at update {update.number:,}; it was {before:.4f} before",
                "spike",
                number=update.number,
                loss=update.mean,
            )
        empty = sum(update.empty for update in updates)
        if empty:
            self.monitor.event(f"{empty} batch(es) without a labelled token: they count for nothing", "empty_batches")
        if self.guard.bad_in_a_row >= self.args.max_bad_updates:
            raise ValueError(
                f"epoch {self.epoch + 1}, step {self.step}: loss or gradient were not finite in the last "
                f"{self.guard.bad_in_a_row} updates, which were left out (--max_bad_updates). Lower --learning_rate. "
                f"Their rows are in metrics.jsonl; the last save is of update {self.saver.saved_update or 0:,}"
            )

    def _rows_of(self, update: Update) -> list[str]:
        """The rows that may have spoilt an update: of the batches whose own loss is not finite, or else all of them."""
        where = getattr(self.dataset, "where", lambda index: f"row {index}")
        batches = [(math.isfinite(loss), self.sampler.share(number)) for number, loss in update.batches]
        found = [(fine, [where(index) for index in indices]) for fine, indices in batches]
        found = [part for process in gather(found) for part in process]
        guilty = [rows for fine, rows in found if not fine] or [rows for _, rows in found]
        return [row for rows in guilty for row in rows]

    # --- saving -------------------------------------------------------------------------------------------------------

    @property
    def stopping(self) -> bool:
        """Whether a signal has asked this process to stop."""
        return self.signals.received is not None

    def save(self, step: int) -> None:
        """The weights, and the state to resume from: when it is time, at the end of an epoch, and before stopping."""
        if not self.closes_window or self.failed:
            return
        self.book.end_aside("evaluation")
        stop, due = agree(self.stopping, is_main_process() and self.saver.is_due(step))
        last = self.updates == self.total_steps or self.early.is_over
        if stop or due or last or self._ends_epoch(step):
            self._save_all(step, last)
        if stop and not last:
            self._stop()

    def _save_all(self, step: int, last: bool) -> None:
        """Weights and state, where they are worth it; what the guard has not read yet goes with them."""
        self._read_numbers()
        rng = gather(get_rng_state())
        if not self._weights_are_finite():
            raise ValueError(f"the weights are not finite at update {self.updates:,}: not saved. Lower --learning_rate")
        if not is_main_process():
            return
        self.book.begin_aside()
        has_state = self.saver.attempt(lambda: self._save_state(step, rng), self.updates, self._tell, last)
        if has_state:
            self.saver.saved_update = self.updates
        has_weights = self._save_weights(self.args.save_weight, last)
        self.saver.tried(self.book.end_aside("saving"))
        if last and not (has_state and has_weights):
            raise OSError(f"the last save failed: free space below {self.args.save_dir}, and see the message above")

    def _weights_are_finite(self) -> bool:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return bool(torch.isfinite(torch.stack(torch._foreach_norm(parameters)).sum()))

    def _save_weights(self, name: str, last: bool = False) -> bool:
        """Whether the weights could be saved under that name. For the main process alone."""

        def save():
            self.saver.weights(name, self.export(), self.updates, self.book.metrics)

        return self.saver.attempt(save, self.updates, self._tell, last)

    def _tell(self, line: str, kind: str) -> None:
        self.book.counts["failed_saves"] += 1
        self.monitor.event(line, kind)

    def _save_state(self, step: int, rng: list) -> None:
        lm_checkpoint(
            self.lm_config,
            self.args.save_weight,
            self.model,
            self.optimizer,
            self.epoch,
            step,
            self.book.tracker,
            checkpoints=self.saver.checkpoints,
            rng=rng,
            args=plain(self.args),
            data=self._data,
            rows_per_update=self.order.rows_per_update,
            typed=self.typed,
            pieces=self.pieces,
            model_config=config_dict(self.lm_config),
            seconds=self.book.seconds,
            code=self.code,
            metrics=self.book.metrics,
            counts=self.book.counts,
            folder=self.folder.name,
            scaler=self.scaler,
            **self.stateful,
        )

    # --- the end ------------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        name, saved = signal.Signals(self.signals.received or signal.SIGTERM).name, self.saver.saved_update
        lost = "" if saved == self.updates or not is_main_process() else ", which could not be saved"
        Logger(
            f"stopped by {name} after update {self.updates:,} of {self.total_steps:,}{lost}: the same command with "
            f"--from_resume 1 goes on from update {saved or 0:,}"
        )
        sys.exit(128 + (self.signals.received or signal.SIGTERM))

    def __enter__(self) -> TrainRun:
        return self

    def __exit__(self, kind, error, _) -> None:
        """Write down how the run ended, and leave the processes' group."""
        try:
            try:
                if error is None:
                    self._finish()
            except Exception as failure:
                error = failure
                raise
            finally:
                self._end_record(error)
                self.signals.restore()
            self._leave_group(error)
        except RuntimeError as failure:
            error = failure
            if not lost_peer(failure):
                raise
        if isinstance(error, RuntimeError) and lost_peer(error):
            raise ConnectionError(
                f"another process of this run has ended or does not answer ({str(error).splitlines()[0]}): see its own "
                "message. The same command with --from_resume 1 goes on from the last save"
            ) from error

    def _finish(self) -> None:
        """Put the last metrics into the sidecar, say where the weights are."""
        if is_main_process():
            self.saver.finish(self.export, self.updates, self.book.metrics)
        Logger(f"weights: {self.saver.path(self.args.save_weight)}")

    def _end_record(self, error: BaseException | None) -> None:
        if self.args.use_compile == "1":
            torch.compiler.set_stance("default")
        status = "stopped early" if self.early.is_over else "finished"
        if error is not None:
            status = "stopped" if isinstance(error, (SystemExit, KeyboardInterrupt)) else "failed"
        best = {"loss": self.early.best, "update": self.early.best_update} if self.early.best_update else None
        self.book.end(
            status,
            f"{type(error).__name__}: {error}" if status == "failed" else None,
            updates=self.updates,
            of=self.total_steps,
            saved_update=self.saver.saved_update,
            best=best,
            counts=self.book.counts | self.guard.counts,
        )

    def _leave_group(self, error: BaseException | None) -> None:
        """Only together: a process that failed just ends, and the others notice."""
        if not dist.is_initialized() or not (error is None or isinstance(error, SystemExit)):
            return
        dist.barrier()
        # the wrapper holds the group's threads: it goes first, or they may outlive the group and abort the exit
        self.model = unwrap(self.model)
        gc.collect()
        dist.destroy_process_group()
