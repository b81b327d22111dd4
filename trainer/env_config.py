"""Environment variables as defaults of the stages' flags: one table.

What is typed on the command line wins over the environment, the environment over --preset and the stages' defaults.
MINIGPT_DATA_CACHE_DIR wins over MINIMIND_CACHE_DIR, which data scripts go by as well. An empty variable is none.

    MINIGPT_TRAIN_SEED=7 MINIGPT_VAL_SPLIT=0.02 python trainer/train_pretrain.py
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys

PREFIX = "MINIGPT_"

# variable -> flag, without its dashes
ENVIRONMENT = {
    "MINIGPT_TRAIN_SEED": "seed",
    "MINIGPT_VAL_SPLIT": "val_ratio",
    "MINIGPT_GLOBAL_SAMPLE_RATIO": "sample_ratio",
    "MINIGPT_REGRESSION_INTERVAL": "regression_interval",
    "MINIGPT_REGRESSION_EVAL": "regression_eval",
    "MINIGPT_REGRESSION_PROMPTS": "regression_prompts",
    "MINIGPT_EARLY_STOP_PATIENCE": "patience",
    "MINIGPT_EARLY_STOP_DELTA": "min_delta",
    "MINIGPT_LABEL_SMOOTHING": "label_smoothing",
    "MINIGPT_STEP_LOG_INTERVAL": "log_interval",
    "MINIGPT_SAMPLE_PROMPTS": "sample_prompts",
    "MINIGPT_MONITOR": "monitor",
    "MINIGPT_CURVES": "curves",
    "MINIGPT_SAVE_MINUTES": "save_minutes",
    "MINIGPT_KEEP_CHECKPOINTS": "keep_checkpoints",
    "MINIGPT_OOM_POLICY": "oom_policy",
    "MINIGPT_LEARNING_RATE": "learning_rate",
    "MINIGPT_WARMUP_STEPS": "warmup_steps",
    "MINIGPT_BATCH_SIZE": "batch_size",
    "MINIGPT_ACCUMULATION_STEPS": "accumulation_steps",
    "MINIGPT_MAX_STEPS": "max_steps",
    "MINIGPT_MAX_SEQ_LEN": "max_seq_len",
    "MINIGPT_DTYPE": "dtype",
    "MINIGPT_DEVICE": "device",
    "MINIGPT_DATA_STREAMING": "streaming",
    "MINIGPT_DATA_CACHE_DIR": "cache_dir",
    "MINIGPT_HIDDEN_SIZE": "hidden_size",
    "MINIGPT_NUM_HIDDEN_LAYERS": "num_hidden_layers",
}


def set_defaults_from_environment(parser: argparse.ArgumentParser) -> None:
    """Take the values of the table's variables that are set as defaults of their flags, and name them all in --help.

    A variable of a flag that this parser lacks is left alone. A value that its flag would not take ends the process
    with one line and status 2; a variable of this prefix that is not in the table is told.
    """
    flags = {action.dest: action for action in parser._actions}
    for variable, flag in ENVIRONMENT.items():
        text = os.environ.get(variable, "")
        if flag in flags and text:
            parser.set_defaults(**{flag: _value(parser, flags[flag], variable, text)})
    names = ", ".join(f"{variable} (--{flag})" for variable, flag in ENVIRONMENT.items() if flag in flags)
    parser.epilog = f"Environment variables that set defaults of flags; what is typed wins: {names}"
    if os.environ.get("RANK", "0") == "0":  # once, not once per process of torchrun
        for variable in sorted(os.environ.keys() - ENVIRONMENT.keys()):
            if variable.startswith(PREFIX):
                print(f"warning: {variable} sets nothing here{_near(variable)}", file=sys.stderr)


def _value(parser: argparse.ArgumentParser, action: argparse.Action, variable: str, text: str):
    """What the flag would make of `text` on the command line."""
    flag = max(action.option_strings, key=len)
    try:
        value = action.type(text) if action.type else text
    except argparse.ArgumentTypeError as error:
        parser.exit(2, f"error: {variable}={text!r} does not fit {flag}: {error}\n")
    except ValueError:
        parser.exit(2, f"error: {variable}={text!r} does not fit {flag}: no valid {action.type.__name__}\n")
    if action.choices is not None and value not in action.choices:
        parser.exit(2, f"error: {variable}={text!r} does not fit {flag}: choose one of {', '.join(action.choices)}\n")
    return value


def _near(variable: str) -> str:
    names = [known.removeprefix(PREFIX) for known in ENVIRONMENT]
    near = difflib.get_close_matches(variable.removeprefix(PREFIX), names, n=2, cutoff=0.7)
    return f": do you mean {' or '.join(PREFIX + name for name in near)}?" if near else ""
