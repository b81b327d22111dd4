"""What the numbers of each update say: updates that were not finite, batches without labels, spikes of the loss.

Nothing here makes a GPU wait. Each update leaves a few scalars on the device; the log line, which waits anyway, fetches
those of all updates since the last one.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass

import torch

# a loss so many standard deviations above the mean of the last updates, and so many times the mean, is a spike
SPIKE_DEVIATIONS, SPIKE_RATIO, SPIKE_HISTORY, SPIKE_FROM = 6.0, 1.1, 100, 20


@dataclass
class Update:
    """One update as the log sees it, over all processes.

    loss, aux_loss: summed over tokens; tokens: those with a label. empty: batches without any. left_out: the weights
    stayed as they were, because the gradient was not finite or there was no label. bad: because it was not finite.
    """

    number: int
    loss: float
    aux_loss: float
    tokens: float
    empty: int
    left_out: bool
    bad: bool
    grad_norm: float
    batches: list[tuple[int, float]]  # of this process: their number in the epoch, their loss

    @property
    def mean(self) -> float:
        return self.loss / max(self.tokens, 1)


class NumberGuard:
    """Collects the numbers of updates on the device, and judges them when they are read.

    Args:
        scaled: a gradient scaler tries larger scales until one is too large for fp16, so only a loss that is not finite
            is a fault there.

    Attributes:
        counts: over the whole run, resumed or not: bad_updates, empty_batches, spikes.
        bad_in_a_row: updates left out, up to the last one that was read, because they were not finite.
        unlogged: updates that were read for a save, and wait for the next log line.
    """

    def __init__(self, scaled: bool = False):
        self.scaled, self.unlogged = scaled, []
        self.counts = {"bad_updates": 0, "empty_batches": 0, "spikes": 0}
        self.bad_in_a_row = 0
        self._history: deque[float] = deque(maxlen=SPIKE_HISTORY)
        self._closed: list[tuple[int, list[int], torch.Tensor, torch.Tensor]] = []
        self.new_window()

    def new_window(self) -> None:
        self._batches: list[torch.Tensor] = []
        self._numbers: list[int] = []

    def add(self, number: int, loss_sum: torch.Tensor, aux_loss: torch.Tensor, tokens: torch.Tensor, real: bool):
        """Note a batch, all scalars on the device; real: it holds rows of this process."""
        empty = (tokens == 0).float() * real
        self._batches.append(torch.stack([loss_sum.detach().float(), (aux_loss * tokens).detach(), tokens, empty]))
        self._numbers.append(number)

    def close(self, update: int, grad_norm: torch.Tensor, left_out: torch.Tensor) -> None:
        """The window of these batches became update number `update`; the arguments are alike on all processes."""
        outcome = torch.stack([left_out.float(), grad_norm.float()])
        self._closed.append((update, self._numbers, torch.stack(self._batches), outcome))
        self.new_window()

    def read(self, add_up=lambda tensor: None) -> list[Update]:
        """All updates since the last reading; add_up sums a tensor over the processes, in place."""
        if not self._closed:
            return []
        sums = torch.stack([batches.sum(dim=0) for _, _, batches, _ in self._closed])  # [U, 4]
        add_up(sums)
        outcomes = torch.stack([outcome for *_, outcome in self._closed])  # [U, 2]
        losses = torch.cat([batches[:, 0] for _, _, batches, _ in self._closed])
        sizes = [sums.numel(), outcomes.numel(), losses.numel()]
        flat = torch.cat([sums.flatten(), outcomes.flatten(), losses])
        sums, outcomes, losses = (part.tolist() for part in flat.cpu().split(sizes))  # one transfer
        updates, losses = [], iter(losses)
        for i, (number, numbers, *_) in enumerate(self._closed):
            loss, aux_loss, tokens, empty = sums[i * 4 : i * 4 + 4]
            left_out, grad_norm = outcomes[i * 2 : i * 2 + 2]
            bad = not math.isfinite(loss if self.scaled else grad_norm)  # of all processes, so all agree
            own = [(n, next(losses)) for n in numbers]
            updates.append(Update(number, loss, aux_loss, tokens, round(empty), left_out > 0, bad, grad_norm, own))
        self._closed = []
        return updates

    def judge(self, updates: list[Update]) -> list[tuple[Update, float]]:
        """Count what went wrong; returns the spikes, each with the mean loss of the updates before it."""
        spikes = []
        for update in updates:
            self.counts["empty_batches"] += update.empty
            self.counts["bad_updates"] += update.bad
            self.bad_in_a_row = self.bad_in_a_row + 1 if update.bad else 0
            if update.left_out:
                continue
            mean = sum(self._history) / max(len(self._history), 1)
            if len(self._history) >= SPIKE_FROM and self._is_spike(update.mean, mean):
                spikes.append((update, mean))
            # a spike counts as history too: a loss that stays high is not a spike each time
            self._history.append(update.mean)
        self.counts["spikes"] += len(spikes)
        return spikes

    def _is_spike(self, loss: float, mean: float) -> bool:
        deviation = math.sqrt(sum((value - mean) ** 2 for value in self._history) / len(self._history))
        return loss > max(mean + SPIKE_DEVIATIONS * deviation, mean * SPIKE_RATIO)

    def state_dict(self) -> dict:
        return {
            "counts": dict(self.counts),
            "bad_in_a_row": self.bad_in_a_row,
            "history": list(self._history),
            "unlogged": [asdict(update) | {"batches": []} for update in self.unlogged],
        }

    def load_state_dict(self, state: dict) -> None:
        self.counts = dict(state["counts"])
        self.bad_in_a_row = state["bad_in_a_row"]
        self._history = deque(state["history"], maxlen=SPIKE_HISTORY)
        self.unlogged = [Update(**fields) for fields in state["unlogged"]]
