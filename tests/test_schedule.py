"""The learning rate against the schedulers of transformers, hand-worked numbers, and what the log says of it."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)

from trainer import trainer_utils
from trainer.schedule import SCHEDULES, describe_schedule, get_lr, get_lr_with_warmup, warmup_steps_of

LR, STEPS = 2e-3, 60


def rates(schedule, warmup, min_ratio=0.1, steps=STEPS):
    return [get_lr_with_warmup(step, steps, LR, warmup, schedule, min_ratio) for step in range(steps + 1)]


def arguments(**changes):
    fields = {"learning_rate": 1e-3, "lr_schedule": "cosine", "min_lr_ratio": 0.1, "warmup_ratio": 0.05}
    return SimpleNamespace(**fields | {"warmup_steps": None} | changes)


def reference(schedule, warmup, min_ratio):
    """The rates that transformers gives, [STEPS + 2]."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = {
        "cosine": lambda: get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, STEPS, min_lr_rate=min_ratio),
        "linear": lambda: get_polynomial_decay_schedule_with_warmup(optimizer, warmup, STEPS, LR * min_ratio),
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, warmup),
    }[schedule]()
    found = []
    for _ in range(STEPS + 2):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_rates_are_those_of_transformers(schedule, warmup, min_ratio):
    """Its first update of a warm-up has the rate 0 and moves nothing: ours begins with its second."""
    ours, theirs = rates(schedule, warmup, min_ratio), reference(schedule, warmup, max(min_ratio, 1e-12))
    assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1], rel=1e-9)
    assert ours[warmup:] == pytest.approx(theirs[warmup : STEPS + 1], abs=1e-11)


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_up_to_the_peak_without_a_jump_and_never_up_again(schedule, warmup):
    found = rates(schedule, warmup)
    assert max(found) == found[warmup] == pytest.approx(LR, rel=1e-12)
    assert found[max(warmup - 1, 0)] == pytest.approx(LR, rel=1e-12)
    assert all(a < b for a, b in itertools.pairwise(found[:warmup]))
    assert all(a >= b for a, b in itertools.pairwise(found[warmup:]))
    assert found[-1] == pytest.approx(LR if schedule == "constant" else LR / 10, rel=1e-12)


def test_step_worked_by_hand():
    """DeepSeek LLM's: all of it until 80 % of the run, warm-up included, 31.6 % until 90 %, then 10 %."""
    found = [get_lr_with_warmup(step, 20, 1.0, 2, "step") for step in range(20)]
    assert found == [0.5] + [1.0] * 15 + [pytest.approx(0.3162278)] * 2 + [0.1] * 2
    assert get_lr_with_warmup(17, 20, 1.0, 0, "step", 0.25) == 0.5
    # numbers of updates that floating point would round to the wrong side
    for steps in (10, 30, 70, 1000):
        found = rates("step", 0, steps=steps)
        assert found.count(LR) == steps * 8 // 10 and found[:-1].count(LR * 0.1) == steps // 10


def test_minimind_names_mean_what_they_meant():
    assert trainer_utils.get_lr is get_lr and trainer_utils.get_lr_with_warmup is get_lr_with_warmup
    for step in range(STEPS):
        assert get_lr_with_warmup(step, STEPS, LR) == get_lr(step, STEPS, LR)  # bit for bit


def test_an_unknown_schedule_names_the_known():
    with pytest.raises(ValueError, match="'warm'.*cosine, linear, step, constant"):
        get_lr_with_warmup(0, 10, 1.0, schedule="warm")


def test_warmup_of_the_flags():
    assert warmup_steps_of(arguments(), 640) == 32
    assert warmup_steps_of(arguments(warmup_ratio=0.0), 640) == 0
    assert warmup_steps_of(arguments(warmup_steps=0), 640) == 0
    assert warmup_steps_of(arguments(warmup_steps=640), 640) == 640
    for wrong in (641, -1):
        with pytest.raises(ValueError, match=f"--warmup_steps {wrong}, but the run has 640 updates: pass"):
            warmup_steps_of(arguments(warmup_steps=wrong), 640)


def test_the_log_says_the_way_and_the_phase():
    cosine = describe_schedule(arguments(), 640)
    assert cosine == "learning rate: 32 updates of warm-up to 1.0e-03, then cosine to 1.0e-04"
    linear = arguments(warmup_steps=0, lr_schedule="linear", min_lr_ratio=0.5)
    assert describe_schedule(linear, 640) == "learning rate: 1.0e-03, linear to 5.0e-04"
    constant = arguments(warmup_steps=0, lr_schedule="constant")
    assert describe_schedule(constant, 640) == "learning rate: constant at 1.0e-03"
    constant = arguments(warmup_steps=1, lr_schedule="constant")
    assert describe_schedule(constant, 640) == (
        "learning rate: 1 update of warm-up to 1.0e-03, then constant at 1.0e-03"
    )
    assert describe_schedule(arguments(), 640, 7) == cosine + "; after 7 of 640 updates in the warm-up, at 2.5e-04"
    assert describe_schedule(arguments(), 640, 336) == (
        cosine + "; after 336 of 640 updates in the cosine part, at 5.5e-04"
    )
    assert describe_schedule(arguments(), 640, 640) == cosine
