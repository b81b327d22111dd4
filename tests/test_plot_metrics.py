"""The picture of the loss curves."""

import json

from conftest import run_script
from scripts.plot_metrics import x_values


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


def test_tokens_are_counted_up():
    entries = [{"update": 2, "tokens": 50, "seconds": 1.5}, {"update": 4, "tokens": 30, "seconds": 3.0}]
    entries += [{"update": 4, "val_loss": 2.0, "seconds": 3.2}]
    assert x_values(entries, "tokens") == [50, 80, 80]
    assert x_values(entries, "updates") == [2, 4, 4] and x_values(entries, "seconds") == [1.5, 3.0, 3.2]


def test_runs_in_one_picture_for_each_axis(tmp_path):
    paths = []
    for name in ("a", "b"):
        paths.append(tmp_path / f"{name}.metrics.jsonl")
        entry = {"update": 1, "tokens": 9, "seconds": 1.0, "loss": 4.0}
        paths[-1].write_text(json.dumps(entry) + "\n" + json.dumps(entry | {"val_loss": 3.0}) + "\n", encoding="utf-8")
    done = run_script("scripts/plot_metrics.py", *paths, "--together", "tokens", "seconds", "--out", tmp_path / "c.svg")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c.svg").stat().st_size > 10_000
