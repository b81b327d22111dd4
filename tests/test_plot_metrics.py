"""The picture of the loss curves."""

import json

from conftest import run_script


def test_draws_training_and_validation(tmp_path):
    entries = [{"update": i, "loss": 5 - i / 10} for i in range(10)] + [{"update": 10, "val_loss": 4.2}]
    path = tmp_path / "run.metrics.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    done = run_script("scripts/plot_metrics.py", path, path, "--out", tmp_path / "new/curves.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new/curves.png").read_bytes()[:4] == b"\x89PNG"


def test_another_file_is_refused_by_name(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"text": "a"}\n', encoding="utf-8")
    done = run_script("scripts/plot_metrics.py", path, "--out", tmp_path / "x.png")
    assert done.returncode == 2 and "other.jsonl is no metrics file" in done.stderr and "Traceback" not in done.stderr
