"""The learning rate of each update: a linear warm-up, then one of four ways down.

The rate follows from the number of the update alone, so that a resumed run needs no state to go on exactly.

    python trainer/train_pretrain.py --lr_schedule step --warmup_steps 200 --min_lr_ratio 0.1
"""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "step", "constant")


def get_lr(current_step: int, total_steps: int, lr: float) -> float:
    """Cosine from lr down to lr / 10 (MiniMind's schedule: 1.0 at the first step, 0.1 at the last)."""
    return lr * (0.1 + 0.45 * (1 + math.cos(math.pi * current_step / total_steps)))


def get_lr_with_warmup(
    current_step: int,
    total_steps: int,
    lr: float,
    warmup_steps: int = 0,
    schedule: str = "cosine",
    min_ratio: float = 0.1,
) -> float:
    """Linear from 0 to lr over warmup_steps, then the schedule over the rest; steps count updates from 0.

    Args:
        schedule: cosine and linear fall from lr to lr * min_ratio (SGDR, https://arxiv.org/abs/1608.03983 eq. 5, with
            one cycle); step is lr until 80 % of the whole run, lr * sqrt(min_ratio) until 90 % and lr * min_ratio
            after: 31.6 % and 10 % as in DeepSeek LLM (https://arxiv.org/abs/2401.02954 section 2.3); constant stays.

    Raises:
        ValueError: another schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"no schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if current_step < warmup_steps:
        return lr * (current_step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    if schedule == "step":
        if 10 * current_step < 8 * total_steps:
            return lr
        return lr * (math.sqrt(min_ratio) if 10 * current_step < 9 * total_steps else min_ratio)
    step, steps = current_step - warmup_steps, max(total_steps - warmup_steps, 1)
    if schedule == "linear":
        return lr * (1 - (1 - min_ratio) * step / steps)
    return lr * (min_ratio + (1 - min_ratio) / 2 * (1 + math.cos(math.pi * step / steps)))


def warmup_steps_of(args, total_steps: int) -> int:
    """Updates of warm-up: --warmup_steps where it is given, else that share of the run which --warmup_ratio says.

    Raises:
        ValueError: fewer than none, or more than the run has.
    """
    if args.warmup_steps is None:
        return round(total_steps * args.warmup_ratio)
    if not 0 <= args.warmup_steps <= total_steps:
        raise ValueError(
            f"--warmup_steps {args.warmup_steps}, but the run has {total_steps:,} updates: "
            f"pass a number from 0 to {total_steps}, or leave it to --warmup_ratio"
        )
    return args.warmup_steps


def describe_schedule(args, total_steps: int, done: int = 0) -> str:
    """One line for the log: the way of the learning rate, and where a run resumed after `done` updates stands."""
    warmup, lr, kind = warmup_steps_of(args, total_steps), args.learning_rate, args.lr_schedule
    way = f"constant at {lr:.1e}" if kind == "constant" else f"{kind} to {lr * args.min_lr_ratio:.1e}"
    if warmup:
        way = f"{warmup:,} update{'s' * (warmup > 1)} of warm-up to {lr:.1e}, then {way}"
    elif kind != "constant":
        way = f"{lr:.1e}, {way}"
    if not 0 < done < total_steps:
        return f"learning rate: {way}"
    phase = "in the warm-up" if done < warmup else f"in the {kind} part"
    now = get_lr_with_warmup(done, total_steps, lr, warmup, kind, args.min_lr_ratio)
    return f"learning rate: {way}; after {done:,} of {total_steps:,} updates {phase}, at {now:.1e}"
