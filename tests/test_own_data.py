"""The run on one's own data: rows held back, both stages, answers, curves; as a user types it."""

import json

import pytest

from conftest import ROOT, run_script


@pytest.fixture
def data(tmp_path):
    for name in ("pretrain", "sft"):
        lines = (ROOT / f"dataset/sample/{name}.jsonl").read_text(encoding="utf-8").splitlines()[:220]
        (tmp_path / f"my_{name}.jsonl").write_text("\n".join([*lines, '{"broken": 1}']), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_from_files_to_answers_and_curves(data):
    out = data / "out"
    done = run_script(
        *(ROOT / "scripts/own_data.py", "--pretrain", "my_pretrain.jsonl", "--sft", "my_sft.jsonl", "--preset", "tiny"),
        *("--out_dir", out, "--pretrain_steps", 2, "--sft_steps", 2, "--batch_size", 2, "--max_seq_len", 64),
        *("--prompt", "你好", "--prompt", "hello"),
        cwd=data,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("$ python eval_llm.py") == 2 and done.stdout.count("held back: ") == 2
    assert "pretrain: " in done.stdout and "full_sft: " in done.stdout and "held-back loss" in done.stdout
    for name in ("pretrain", "full_sft"):
        (folder,) = (out / "runs").glob(f"{name}_256-*")
        (source,) = json.loads((folder / "dataset_stats.json").read_text(encoding="utf-8"))
        assert source["bad_rows"] == 1 and source["val_samples"] > 0
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_too_few_rows(data):
    (data / "few.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")
    done = run_script(
        *(ROOT / "scripts/own_data.py", "--pretrain", "few.jsonl", "--sft", "my_sft.jsonl", "--out_dir", data / "o"),
        cwd=data,
    )
    assert done.returncode == 2 and "val" in done.stderr and "Traceback" not in done.stderr
