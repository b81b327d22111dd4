"""The pictures of a run and of several: what is read, what is drawn, and what is said where that cannot be."""

import json
import math
import sys

import pytest

from conftest import run_script
from scripts import plot_metrics
from trainer import curves
from trainer.curves import curves_figure, draw_curves, read_metrics, running_median, x_values

PNG = b"\x89PNG\r\n\x1a\n"


def write(path, entries, end=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    path.write_text(text + end, encoding="utf-8")
    return path


def a_run(validated=True, events=True, updates=100):
    """Entries of a run whose held-back loss is best at update 60, with all that can happen."""
    entries = []
    for update in range(10, updates + 1, 10):
        entry = {"update": update, "seconds": update / 2, "loss": 5 - update / 50, "tokens": 50, "lr": 1e-3}
        entries.append(entry | {"grad_norm": None if update == 30 else 2.0, "tokens_per_second": 1000.0})
        if validated and update % 20 == 0:
            entries.append({"update": update, "seconds": update / 2, "val_loss": 4 + abs(update - 60) / 100})
        if events and update in (30, 50, 70):
            kind = {30: "bad_update", 50: "spike", 70: "resume"}[update]
            number = {"number": 27} if kind == "bad_update" else {}  # seen at the log line of update 30
            entries.append({"update": update, "seconds": update / 2, "event": kind, **number})
    return entries


def figure(entries, name="run"):
    """The axes of the picture, by what their y axis or their title says."""
    with curves.drawing():
        drawn = curves_figure(entries, name)
    return {axis.get_title() or axis.get_ylabel(): axis for axis in drawn.axes}, drawn


def labels(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


# --- the picture of a run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("events", [True, False])
def test_curves_of_a_run(tmp_path, validated, events):
    path = write(tmp_path / "run" / "metrics.jsonl", a_run(validated, events))
    out = draw_curves(path, tmp_path / "curves.png")
    assert out == tmp_path / "curves.png" and out.read_bytes()[:8] == PNG and out.stat().st_size > 10_000
    assert sorted(each.name for each in tmp_path.iterdir()) == ["curves.png", "run"]  # nothing temporary


def test_what_the_curves_show():
    axes, drawn = figure(a_run())
    assert list(axes) == ["loss (nats per token)", "learning rate", "gradient norm", "tokens per second"]
    loss = axes["loss (nats per token)"]
    assert labels(loss) == [
        "training",
        "held back",
        "best held back: 4.000 at update 60",
        "bad update",
        "spike",
        "resume",
    ]
    lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in loss.lines}
    assert lines["training"] == [(at, 5 - at / 50) for at in range(10, 101, 10)]
    assert lines["held back"] == [(at, 4 + abs(at - 60) / 100) for at in range(20, 101, 20)]
    assert [lines[kind][0][0] for kind in ("bad update", "spike", "resume")] == [27, 50, 70]
    gradient = axes["gradient norm"]
    assert gradient.get_yscale() == "log" and 30 not in gradient.lines[0].get_xdata()
    assert drawn.get_suptitle() == "run"


def test_panels_without_numbers_are_left_out():
    axes, _ = figure([{"update": 3, "val_loss": 2.0}, {"update": 3, "event": "stopped"}])
    assert list(axes) == ["loss (nats per token)"]
    zero, _ = figure([{"update": 1, "loss": 2.0, "grad_norm": 0.0}])
    assert zero["gradient norm"].get_yscale() == "linear"  # a logarithm of nothing


def test_much_noise_is_smoothed_and_still_shown():
    axes, _ = figure([{"update": i, "loss": 2.0 + (9 if i == 500 else i % 2)} for i in range(1000)])
    raw, smooth = axes["loss (nats per token)"].lines
    assert max(raw.get_ydata()) == 11 and max(smooth.get_ydata()) < 3.1 and len(smooth.get_xdata()) == 1000


def test_running_median_by_hand():
    assert running_median([9.0, 5.0, 1.0, 7.0, 3.0], 3) == [9.0, 5.0, 5.0, 3.0, 3.0]
    assert running_median([9.0, 5.0, 1.0, 7.0, 3.0], 5) == [9.0, 5.0, 5.0, 3.0, 3.0]
    assert running_median([4.0], 3) == [4.0] and running_median([1.0, 2.0, 3.0], 1) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("name", ["微调_мини_🙂", "_hidden", "cost$a_{$b", "50%"])
def test_names_of_any_kind(tmp_path, name, recwarn):
    entries = a_run()
    entries[-1] = {"update": 100, "seconds": 1.0, "event": f"事件 {name}"}
    path = write(tmp_path / name / "metrics.jsonl", entries)
    assert draw_curves(path, tmp_path / name / "curves.png").read_bytes()[:8] == PNG
    plot_metrics.main(plot_metrics.parse_args([str(path.parent), str(path), "--out", str(tmp_path / "x.png")]))
    with curves.drawing():
        together = plot_metrics.losses_figure([(name, entries), ("b", entries)], ["updates"])
    assert len(labels(together.axes[0])) == 4
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


# --- what cannot be drawn ends no run ---------------------------------------------------------------------------------


def test_curves_that_cannot_be_drawn_are_said(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "metrics.jsonl", [])
    assert draw_curves(path, tmp_path / "a.png") is None and "no entry yet" in capsys.readouterr().out
    assert draw_curves(tmp_path / "gone.jsonl", tmp_path / "a.png") is None
    assert "gone.jsonl" in capsys.readouterr().out
    write(path, a_run())
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert draw_curves(path, tmp_path / "file/a.png") is None and "no curves drawn" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_curves(path, tmp_path / "a.png") is None
    assert capsys.readouterr().out == "no curves drawn: matplotlib is not installed: pip install matplotlib\n"
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plot_metrics.main(plot_metrics.parse_args([str(path), "--out", str(tmp_path / "a.png")]))
    assert not (tmp_path / "a.png").exists()


def test_a_picture_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = write(tmp_path / "metrics.jsonl", a_run())
    draw_curves(path, tmp_path / "curves.png")
    before = (tmp_path / "curves.png").read_bytes()

    def fail(self, path, **_):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    assert draw_curves(path, tmp_path / "curves.png") is None
    assert (tmp_path / "curves.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 2


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_left_out(tmp_path):
    path = write(tmp_path / "metrics.jsonl", a_run(), end='{"update": 110, "lo')
    assert read_metrics(path) == a_run()
    lines = path.read_text(encoding="utf-8").replace('"loss"', '"lo', 1)
    path.write_text(lines, encoding="utf-8")  # in the middle it is damage, not a crash
    with pytest.raises(ValueError, match="is no metrics file"):
        read_metrics(path)


def test_line_ends_inside_texts_end_no_line(tmp_path):
    entries = [{"update": 1, "event": "spike", "text": "a\u2028b\x85c"}, {"update": 2, "loss": 1.0}]
    assert read_metrics(write(tmp_path / "metrics.jsonl", entries)) == entries


def test_numbers_that_are_none_are_not_drawn(tmp_path):
    path = write(tmp_path / "metrics.jsonl", [{"update": 1, "loss": 2.0}, {"update": 2, "loss": math.nan}])
    assert curves.points(read_metrics(path), "updates", "loss") == ([1], [2.0])


def test_tokens_are_counted_up():
    entries = [{"update": 2, "tokens": 50, "seconds": 1.5}, {"update": 4, "tokens": 30, "seconds": 3.0}]
    entries += [{"update": 4, "val_loss": 2.0, "seconds": 3.2}]
    assert x_values(entries, "tokens") == [50, 80, 80]
    assert x_values(entries, "updates") == [2, 4, 4] and x_values(entries, "seconds") == [1.5, 3.0, 3.2]


# --- the command ------------------------------------------------------------------------------------------------------


def plot(*command):
    plot_metrics.main(plot_metrics.parse_args([str(each) for each in command]))


@pytest.mark.slow
def test_draws_training_and_validation(tmp_path):
    entries = [{"update": i, "loss": 5 - i / 10} for i in range(10)] + [{"update": 10, "val_loss": 4.2}]
    path = write(tmp_path / "run.metrics.jsonl", entries)
    done = run_script("scripts/plot_metrics.py", path, path, "--out", tmp_path / "new/curves.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new/curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_another_file_is_refused_by_name(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"text": "a"}\n', encoding="utf-8")
    done = run_script("scripts/plot_metrics.py", path, "--out", tmp_path / "x.png")
    assert done.returncode == 2 and "other.jsonl is no metrics file" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_alone_gets_its_curves(tmp_path, capsys):
    write(tmp_path / "run" / "metrics.jsonl", a_run())
    plot(tmp_path / "run")
    assert (tmp_path / "run/curves.png").read_bytes()[:8] == PNG
    plot(tmp_path / "run", "--out", tmp_path / "other.svg")
    assert "<svg" in (tmp_path / "other.svg").read_text(encoding="utf-8")
    assert capsys.readouterr().out.split() == [str(tmp_path / "run/curves.png"), str(tmp_path / "other.svg")]


def test_folders_and_older_files_in_one_picture(tmp_path):
    write(tmp_path / "a" / "metrics.jsonl", a_run())
    write(tmp_path / "b" / "metrics.jsonl", a_run())
    write(tmp_path / "old_256.metrics.jsonl", a_run())
    names = [tmp_path / "a", tmp_path / "b" / "metrics.jsonl", tmp_path / "old_256.metrics.jsonl"]
    assert plot_metrics.names_of([plot_metrics.metrics_file(name) for name in names]) == ["a", "b", "old_256"]
    plot(*names, "--together", "updates", "tokens", "seconds", "--out", tmp_path / "c.svg")
    plot(*names, "--out", tmp_path / "d.svg")
    assert min((tmp_path / name).stat().st_size for name in ("c.svg", "d.svg")) > 10_000


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [write(tmp_path / place / "run" / "metrics.jsonl", a_run()) for place in ("a", "b")]
    assert plot_metrics.names_of(paths) == [str(path) for path in paths]


def test_what_is_wrong_is_said(tmp_path):
    write(tmp_path / "old_256.metrics.jsonl", a_run())
    with pytest.raises(ValueError, match="--out is missing"):
        plot(tmp_path / "old_256.metrics.jsonl")
    with pytest.raises(ValueError, match="no metrics.jsonl: pass one of those in out/runs"):
        plot(tmp_path, "--out", tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="no file at"):
        plot(tmp_path / "gone", "--out", tmp_path / "a.png")
