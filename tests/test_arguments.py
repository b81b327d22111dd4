"""Where a typed path is looked for, how flags become a configuration, and how a mistake ends a script."""

import argparse

import pytest

from conftest import ROOT
from model.presets import PRESETS
from trainer.arguments import (
    STOPPED,
    add_model_flags,
    data_source,
    friendly_errors,
    input_path,
    output_path,
    positive_int,
    sample_hint,
    stage_parser,
    stated_sizes,
    zero_or_one,
)

SAMPLE = ROOT / "dataset/sample/pretrain.jsonl"
STAGE = {"save_weight": "toy", "from_weight": "none", "data_path": "toy.jsonl", "epochs": 1, "batch_size": 2}
STAGE |= {"learning_rate": 1e-3, "max_seq_len": 64}


def sizes(*flags):
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    return stated_sizes(parser.parse_args([str(flag) for flag in flags]))


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cwd", [".", "trainer", "scripts", "dataset/sample"])
@pytest.mark.parametrize(
    "typed", ["dataset/sample/pretrain.jsonl", "./dataset/sample/pretrain.jsonl", "../dataset/sample/pretrain.jsonl"]
)
def test_every_way_to_type_a_path_works_in_every_folder(typed, cwd, monkeypatch):
    monkeypatch.chdir(ROOT / cwd)
    assert input_path(typed).samefile(SAMPLE)


def test_a_path_works_from_outside_and_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert input_path("../../dataset/sample/pretrain.jsonl").samefile(SAMPLE)
    assert input_path(SAMPLE) == SAMPLE
    assert input_path("model").samefile(ROOT / "model")  # folders too


def test_the_working_directory_goes_before_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    assert input_path("README.md").read_text(encoding="utf-8") == "mine"


def test_home_is_understood(tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    (tmp_path / "rows.jsonl").touch()
    assert input_path("~/rows.jsonl") == tmp_path / "rows.jsonl"
    assert output_path("~/out") == tmp_path / "out"


def test_missing_file_names_both_places_and_the_sample(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        input_path("../dataset/pretrain_hq.jsonl")
    for words in (tmp_path / "..", ROOT / "dataset" / "pretrain_hq.jsonl", "dataset/sample/pretrain.jsonl"):
        assert str(words) in str(error.value)
    with pytest.raises(FileNotFoundError) as error:
        input_path(tmp_path / "rows.jsonl")
    assert str(error.value).count("rows.jsonl") == 1 and "sample" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "sample"),
    [
        ("pretrain_hq.jsonl", "pretrain.jsonl"),
        ("sft_mini_512.jsonl", "sft.jsonl"),
        ("lora_identity.jsonl", "identity.jsonl"),
        ("rows.jsonl", None),
    ],
)
def test_sample_hint(name, sample):
    assert sample_hint(name) == (
        f", or try the sample data first: --data_path dataset/sample/{sample}" if sample else ""
    )


def test_output_path_belongs_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert output_path("out/x") == tmp_path / "out" / "x"
    assert output_path(ROOT / "out") == ROOT / "out"
    assert not (tmp_path / "out").exists()


def test_data_source_is_a_file_or_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data_source("dataset/sample/pretrain.jsonl") == str(SAMPLE)
    for name in ("org/name", "org/name:train", "org/name:config:train[:10%]"):
        assert data_source(name) == name
    for path in ("dataset/nothing.jsonl", "./org/name", "../org/name", "/org/name", "name", "a/b/c", "~/rows"):
        with pytest.raises(FileNotFoundError):
            data_source(path)


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("1", 1), ("True", 1), ("false", 0), ("yes", 1), ("NO", 0)])
def test_zero_or_one(text, value):
    assert zero_or_one(text) == value


@pytest.mark.parametrize("text", ["2", "", "maybe", "01"])
def test_not_zero_or_one(text):
    with pytest.raises(argparse.ArgumentTypeError, match="neither 0 nor 1"):
        zero_or_one(text)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", ""])
def test_not_a_positive_int(text):
    assert positive_int("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="no whole number above 0"):
        positive_int(text)


def test_nothing_stated_is_nothing_said():
    assert sizes() == {}


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name):
    from model.model_minimind import MiniMindConfig

    assert sizes("--preset", name) == PRESETS[name]
    assert MiniMindConfig(**sizes("--preset", name)).hidden_size == PRESETS[name]["hidden_size"]


def test_single_flags_win_over_the_preset_and_leave_it_as_it_is():
    before = dict(PRESETS["moe"])
    stated = sizes("--preset", "moe", "--hidden_size", 128, "--use_moe", "False", "--dropout", 0.1)
    assert stated == {**before, "hidden_size": 128, "use_moe": False, "dropout": 0.1}
    assert stated["use_moe"] is False and PRESETS["moe"] == before


def test_unknown_preset_names_the_known():
    with pytest.raises(ValueError, match="'huge'.*tiny, small, base, moe, minimind3, minimind3_moe"):
        sizes("--preset", "huge")


def test_old_spellings():
    old = sizes("--dim", 64, "--n_layers", 3, "--num_experts", 8)
    assert old == {"hidden_size": 64, "num_hidden_layers": 3, "n_routed_experts": 8}
    assert old == sizes("--hidden_size", 64, "--num_hidden_layers", 3, "--n_routed_experts", 8)


def test_context_stretching():
    assert sizes("--inference_rope_scaling") == {"inference_rope_scaling": True}


def test_stage_parser(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = stage_parser("Toy", **STAGE)
    args = parser.parse_args([])
    assert {name: getattr(args, name) for name in STAGE} == STAGE | {"data_path": ["toy.jsonl"]} and args.stage == "Toy"
    assert (args.save_dir, args.checkpoint_dir) == (ROOT / "out", ROOT / "checkpoints")
    assert args.save_dtype == "float32" and args.on_bad_row == "raise" and args.seed == 42
    args = parser.parse_args(["--out_dir", "mine", "--ddp"])
    assert args.save_dir == tmp_path / "mine"


def test_flags_are_never_guessed_from_their_beginning(capsys):
    with pytest.raises(SystemExit):
        stage_parser("Toy", **STAGE).parse_args(["--epoch", "3"])
    assert "unrecognized arguments: --epoch" in capsys.readouterr().err


# --- endings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("bad size"), FileNotFoundError("no file"), PermissionError("not yours")])
def test_a_mistake_is_one_line_and_status_2(error, capsys, monkeypatch):
    monkeypatch.delenv("MINIMIND_DEBUG", raising=False)
    with pytest.raises(SystemExit) as end, friendly_errors():
        raise error
    assert end.value.code == 2 and capsys.readouterr().err == f"error: {error}\n"
    monkeypatch.setenv("MINIMIND_DEBUG", "1")
    with pytest.raises(type(error)), friendly_errors():
        raise error


def test_ctrl_c_is_status_130_with_the_way_back(capsys):
    with pytest.raises(SystemExit) as end, friendly_errors(STOPPED):
        raise KeyboardInterrupt
    assert end.value.code == 130 and "--from_resume 1" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback():
    with pytest.raises(TypeError), friendly_errors():
        raise TypeError("ours, not the user's")


def test_a_good_end_is_left_alone(capsys):
    with friendly_errors():
        done = True
    assert done and capsys.readouterr().err == ""
