"""When a run ends before its last update: a signal from outside, or a held-back loss that no longer falls."""

from __future__ import annotations

import os
import signal
import threading
import time

# torchrun passes a Ctrl-C on to processes that the terminal has already told
REPEATED_BY_TORCHRUN = 5.0  # seconds


# Ctrl-C, the system or a scheduler, and the terminal that goes away with a closed laptop (Windows has no such signal)
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopSignals:
    """Notes the first signal to stop, so that the run can finish its step and save; a second one acts at once.

    Handlers belong to the main thread: elsewhere (a WebUI, say) signals are left to whoever runs there.
    """

    def __init__(self, say=print):
        self.received: int | None = None
        self.say, self._old, self._at = say, {}, 0.0
        if threading.current_thread() is threading.main_thread():
            # one that is ignored stays so: nohup wants the run to outlive its terminal
            noted = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._old = {number: signal.signal(number, self._note) for number in noted}

    def _note(self, number, frame) -> None:
        if self.received is None:
            self.received, self._at = number, time.monotonic()
            name = signal.Signals(number).name
            self.say(f"\n{name}: finishing this step and saving; once more stops at once, without saving")
        elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - self._at > REPEATED_BY_TORCHRUN:
            self.restore()
            signal.raise_signal(number)

    def restore(self) -> None:
        """Give the signals back to whoever had them before."""
        for number, handler in self._old.items():
            # None: it was not installed from Python, and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old = {}


def leave_signals_alone(_: int) -> None:
    """For a DataLoader's processes: Ctrl-C on a terminal reaches them too, but it is the run's to decide."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)  # a forked process inherits the run's handler


class EarlyStopping:
    """The best held-back loss so far, and whether it is still worth going on.

    Args:
        patience: validations without gain after which the run stops; 0: never.
        min_delta: the smallest fall of the loss, in nats per token, that counts as a gain.
    """

    def __init__(self, patience: int = 0, min_delta: float = 0.0):
        if patience < 0 or min_delta < 0:
            raise ValueError(f"--patience {patience} and --min_delta {min_delta}: neither may be below 0")
        self.patience, self.min_delta = patience, min_delta
        self.best, self.best_update, self.gained_from, self.without_gain = float("inf"), 0, float("inf"), 0

    def update(self, loss: float) -> bool:
        """Take the loss of a validation into account; returns whether it is the lowest so far: see `keep`."""
        if loss < self.gained_from - self.min_delta:
            self.gained_from, self.without_gain = loss, 0
        else:  # a loss that is not a number is no gain either
            self.without_gain += 1
        return loss < self.best

    def keep(self, loss: float, update: int) -> None:
        """The weights with this loss are on the disk: they are the best there are."""
        self.best, self.best_update = loss, update

    @property
    def is_over(self) -> bool:
        return 0 < self.patience <= self.without_gain

    def state_dict(self) -> dict:
        return {
            "best": self.best,
            "best_update": self.best_update,
            "gained_from": self.gained_from,
            "without_gain": self.without_gain,
        }

    def load_state_dict(self, state: dict) -> None:
        self.best, self.best_update = state["best"], state["best_update"]
        self.gained_from, self.without_gain = state["gained_from"], state["without_gain"]
