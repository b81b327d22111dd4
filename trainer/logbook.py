"""The record of a run: its directory, its log lines, the time that each part took, and how it ended.

out/runs/pretrain_512-20261121-104209/
    config.json           arguments, model, data, versions; config-2.json after a resume
    dataset_stats.json    what was read, kept, split off, cut and skipped of each source
    metrics.jsonl         an entry for each log line, validation and event
    summary.json, curves.png, samples.jsonl, regression/
"""

from __future__ import annotations

import math
import time

from model.weights import write_json
from trainer import record
from trainer.curves import draw_curves
from trainer.guard import Update
from trainer.monitor import Monitor, start_tracker
from trainer.probes import ActivationProbe, UpdateProbe, hints, resources
from trainer.resume import plain
from trainer.trainer_utils import Logger, is_main_process
from trainer.validation import perplexity

HINTS_FROM = 30.0  # seconds of a run: before that its numbers say little


class Logbook:
    """Writes on the main process, and measures on all of them.

    Args:
        args: flags. name: of the run, as its directory begins. total, done: updates in all, and before a resume.
        state: the checkpoint that the run goes on from, or None.

    Attributes:
        folder: the run's directory, None off the main process. metrics: the last values of what is measured. counts:
            what went wrong, and how often. data_wait: seconds that steps waited for data since the last line.
    """

    def __init__(self, args, name: str, model, parameters, total: int, done: int, state: dict | None):
        self.args, main = args, is_main_process()
        self.folder, self.tracker = None, None
        if main:
            before = state.get("folder") if state else None
            self.folder = record.open_folder(args.runs_dir or args.save_dir / "runs", name, before)
            if args.use_wandb:
                self.tracker = start_tracker(args, state["wandb_id"] if state else None, self.folder)
        self.monitor = Monitor(self.folder, total, done, main, self.tracker, tensorboard=args.monitor != "off")
        self.weights_probe = UpdateProbe(parameters) if args.monitor != "off" else None
        self.activations = ActivationProbe(model) if args.monitor == "full" else None
        self.metrics = state.get("metrics", {}) if state else {}
        self.counts = state.get("counts", {}) if state else {}
        self.counts = {"failed_saves": 0, "shrunk": 0, **self.counts}
        self.seconds = {"evaluation": 0.0, "saving": 0.0, **(state.get("seconds", {}) if state else {})}
        self.weights_moved, self._hinted, self.resumed_at = None, set(), done
        self.began, self._aside_began = time.monotonic(), None
        self.start_interval()

    def begin(self, lm_config, data: dict, stats: list, code: dict) -> None:
        """Write down what the run is made of."""
        if self.folder is None:
            return
        facts = {"arguments": plain(self.args), "model": lm_config.to_dict(), "data": data, "code": code}
        facts |= {"environment": record.environment(), "updates_before": self.monitor.done}
        record.write_config(self.folder, facts)
        write_json(self.folder / "dataset_stats.json", stats)
        Logger(f"record: {self.folder}")
        for hint in hints(0.0, text_share=data.get("fill")):
            Logger(hint)

    def start_interval(self) -> None:
        self.data_wait, self._interval_began = 0.0, time.monotonic()

    def begin_aside(self) -> None:
        """From here to `end_aside` is no training: it counts neither for tokens/s nor for the next log line."""
        self._aside_began = time.monotonic()

    def end_aside(self, what: str) -> float:
        """Add the time since `begin_aside` to that of `what`; returns it, in seconds, 0 where nothing was begun."""
        if self._aside_began is None:
            return 0.0
        spent = time.monotonic() - self._aside_began
        self.seconds[what] += spent
        self._interval_began += spent
        self._aside_began = None
        return spent

    def log(self, place: str, updates: list[Update], lr: float, extra: dict, **position) -> None:
        """One line and one entry: the mean over the tokens of these updates, and the speed since the last line.

        Args:
            place: where in the run, as the line begins; position: the same as entries.
        """
        counted = [update for update in updates if not update.left_out]
        tokens = sum(update.tokens for update in counted)
        here = sum(
            update.tokens for update in counted if update.number > self.resumed_at
        )  # the others took no time now
        mean = sum(update.loss for update in counted) / tokens if tokens else math.nan
        aux_loss = sum(update.aux_loss for update in counted) / max(tokens, 1)
        elapsed = max(time.monotonic() - self._interval_began, 1e-9)
        left = self.monitor.minutes_left()
        values = {"loss": mean, "ppl": perplexity(mean), "tokens_per_second": here / elapsed}
        self.metrics |= values
        parts = {"loss": f"{mean:.4f}", "ppl": f"{perplexity(mean):.2f}", "lr": f"{lr:.3e}"}
        if aux_loss:
            parts["aux_loss"] = f"{aux_loss:.4f}"
        parts |= {name: f"{value:.4g}" for name, value in extra.items()}
        parts |= {"tokens/s": f"{here / elapsed:,.0f}", "ETA": f"{left:.1f}min"}
        self.monitor.record(
            f"{place} " + " ".join(f"{name}:{value}" for name, value in parts.items()),
            **position,
            **values,
            aux_loss=aux_loss,
            lr=lr,
            grad_norm=updates[-1].grad_norm if updates else math.nan,
            tokens=tokens,
            eta_minutes=left,
            **self._measured(elapsed),
            **extra,
        )
        self.start_interval()

    def _measured(self, elapsed: float) -> dict:
        """What --monitor adds to an entry, and a hint where the numbers call for one."""
        if self.args.monitor == "off":
            return {}
        values = {"data_wait": self.data_wait / elapsed, **resources(self.args.device)}
        if self.weights_moved is not None:
            values["param_norm"], values["update_ratio"] = self.weights_moved.tolist()
        if self.activations is not None:
            values |= self.activations.collect()
        for hint in hints(values["data_wait"], values.get("gpu_load")):
            kind = hint.split(":")[0].split("%")[-1]
            if time.monotonic() - self.began > HINTS_FROM and kind not in self._hinted:
                self._hinted.add(kind)
                Logger(hint)
        return values

    def end(self, status: str, error: str | None, **facts) -> None:
        """Close the files, write the summary, draw the curves; also after a failure."""
        if self.folder is None:
            return
        self.monitor.close()
        minutes = {name: seconds / 60 for name, seconds in self.seconds.items()}
        whole = (time.monotonic() - self.monitor.began) / 60  # also before a resume
        facts |= {"minutes": whole, "minutes_of": minutes, "metrics": self.metrics}
        try:
            record.write_summary(self.folder, {"status": status, "error": error, **facts})
            if self.args.curves:
                draw_curves(self.folder / "metrics.jsonl", self.folder / "curves.png")
        except OSError as reason:  # a full disk: the weights matter more
            Logger(f"the summary of {self.folder} could not be written: {reason}")
