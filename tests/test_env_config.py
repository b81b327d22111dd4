"""Environment variables as defaults: who wins over whom, and what is said of a value or a name that is wrong."""

import argparse
import json
import os
import re

import pytest
from inside import run_inside

from conftest import ROOT
from model.presets import PRESETS
from model.weights import read_state_dict
from trainer.arguments import stage_parser, stated_sizes
from trainer.env_config import ENVIRONMENT, set_defaults_from_environment

STAGE = {"save_weight": "toy", "from_weight": "none", "data_path": "toy.jsonl", "epochs": 1, "batch_size": 2}
STAGE |= {"learning_rate": 1e-3, "max_seq_len": 64}
# (value to set, what the flag becomes)
VALUES = {
    "seed": ("7", 7),
    "val_ratio": ("0.02", 0.02),
    "sample_ratio": ("0.5", 0.5),
    "regression_interval": ("0", 0),
    "regression_eval": ("yes", 1),
    "regression_prompts": ("mine.jsonl", "mine.jsonl"),
    "patience": ("4", 4),
    "min_delta": ("0.01", 0.01),
    "label_smoothing": ("0.05", 0.05),
    "log_interval": ("3", 3),
    "sample_prompts": ("none", "none"),
    "monitor": ("full", "full"),
    "curves": ("0", 0),
    "save_minutes": ("2.5", 2.5),
    "keep_checkpoints": ("5", 5),
    "oom_policy": ("shrink", "shrink"),
    "learning_rate": ("3e-4", 3e-4),
    "warmup_steps": ("12", 12),
    "batch_size": ("9", 9),
    "accumulation_steps": ("3", 3),
    "max_steps": ("20", 20),
    "max_seq_len": ("128", 128),
    "dtype": ("float32", "float32"),
    "device": ("cpu", "cpu"),
    "streaming": ("1", 1),
    "cache_dir": ("none", None),
    "hidden_size": ("96", 96),
    "num_hidden_layers": ("3", 3),
}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith("MINIGPT_") or name == "RANK":
            monkeypatch.delenv(name)


def parsed(*flags):
    return stage_parser("Toy", **STAGE).parse_args([str(flag) for flag in flags])


def test_every_variable_sets_its_flag(monkeypatch, capsys):
    before = vars(parsed())
    for variable, flag in ENVIRONMENT.items():
        text, value = VALUES[flag]
        with monkeypatch.context() as patch:
            patch.setenv(variable, text)
            after = vars(parsed())
        assert after == before | {flag: value} and before[flag] != value, variable
    assert capsys.readouterr().err == ""
    assert set(VALUES) == set(ENVIRONMENT.values()) and len(VALUES) == len(ENVIRONMENT)


def test_who_wins(monkeypatch):
    monkeypatch.setenv("MINIGPT_HIDDEN_SIZE", "96")
    monkeypatch.setenv("MINIGPT_BATCH_SIZE", "9")
    args = parsed("--preset", "tiny")
    assert args.batch_size == 9 != STAGE["batch_size"]
    assert stated_sizes(args) == PRESETS["tiny"] | {"hidden_size": 96}
    args = parsed("--preset", "tiny", "--hidden_size", 64, "--batch_size", 4)
    assert args.batch_size == 4 and stated_sizes(args) == PRESETS["tiny"] | {"hidden_size": 64}


def test_the_cache_of_this_prefix_goes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIMIND_CACHE_DIR", str(tmp_path / "old"))
    assert parsed().cache_dir == tmp_path / "old"
    monkeypatch.setenv("MINIGPT_DATA_CACHE_DIR", str(tmp_path / "new"))
    assert parsed().cache_dir == tmp_path / "new"


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("TRAIN_SEED", "seven", "MINIGPT_TRAIN_SEED='seven' does not fit --seed: no valid int"),
        ("VAL_SPLIT", "1.5", "MINIGPT_VAL_SPLIT='1.5' does not fit --val_ratio: '1.5' is no number below 1"),
        ("MONITOR", "loud", "MINIGPT_MONITOR='loud' does not fit --monitor: choose one of off, light, full"),
        ("HIDDEN_SIZE", "0", "MINIGPT_HIDDEN_SIZE='0' does not fit --hidden_size: '0' is no whole number above 0"),
    ],
)
def test_a_value_that_does_not_fit_is_one_line_and_status_2(variable, text, message, monkeypatch, capsys):
    monkeypatch.setenv(f"MINIGPT_{variable}", text)
    with pytest.raises(SystemExit) as end:
        parsed()
    assert end.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"


def test_an_unknown_variable_is_told_once(monkeypatch, capsys):
    monkeypatch.setenv("MINIGPT_TRAINING_SEED", "7")
    monkeypatch.setenv("MINIGPT_XYZ", "1")
    assert parsed().seed == 42
    assert capsys.readouterr().err.splitlines() == [
        "warning: MINIGPT_TRAINING_SEED sets nothing here: do you mean MINIGPT_TRAIN_SEED?",
        "warning: MINIGPT_XYZ sets nothing here",
    ]
    monkeypatch.setenv("RANK", "1")
    parsed()
    assert capsys.readouterr().err == ""


def test_what_is_empty_or_of_another_parser_sets_nothing(monkeypatch, capsys):
    monkeypatch.setenv("MINIGPT_TRAIN_SEED", "")
    monkeypatch.setenv("MINIGPT_BATCH_SIZE", "many")  # not this parser's to judge
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    set_defaults_from_environment(parser)
    assert vars(parser.parse_args([])) == {"seed": 1} and capsys.readouterr().err == ""
    assert "MINIGPT_TRAIN_SEED (--seed)" in parser.format_help() and "BATCH_SIZE" not in parser.format_help()


def test_a_stage_goes_by_it(tmp_path, monkeypatch):
    """As a user would: sizes over the preset's, the length of rows over the stage's, what is typed over both."""
    sizes = {"HIDDEN_SIZE": 64, "NUM_HIDDEN_LAYERS": 1, "MAX_STEPS": 9, "BATCH_SIZE": 1, "MAX_SEQ_LEN": 32}
    for name, value in sizes.items():
        monkeypatch.setenv(f"MINIGPT_{name}", str(value))
    (tmp_path / "rows.jsonl").write_text('{"text": "one two three four"}\n' * 8, encoding="utf-8")
    done = run_inside(
        "trainer/train_pretrain.py",
        *("--data_path", "rows.jsonl", "--preset", "tiny", "--cache_dir", "none", "--max_steps", 1, "--device", "cpu"),
        *("--save_dir", "out", "--checkpoint_dir", "state", "--sample_prompts", "none", "--use_compile", 0),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    weights = read_state_dict(tmp_path / "out" / "pretrain_64.pth")
    assert not any(".layers.1." in name for name in weights)
    saved = json.loads((tmp_path / "out" / "pretrain_64.json").read_text(encoding="utf-8"))["arguments"]
    assert (saved["max_steps"], saved["batch_size"], saved["max_seq_len"]) == (1, 1, 32)


def test_the_guide_lists_the_whole_table():
    guide = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    pairs = dict(re.findall(r"`(MINIGPT_\w+)` \| `--(\w+)`", guide))
    assert pairs == ENVIRONMENT
