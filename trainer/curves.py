"""The curves of a run as a picture: losses, learning rate, gradient norm, speed, and what happened on the way.

Drawn at the end of a run, and by scripts/plot_metrics.py, which also compares runs.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from statistics import median

from model.weights import atomic_write

METRICS = "metrics.jsonl"
X_AXES = {"updates": "updates", "tokens": "trained tokens", "seconds": "seconds of training"}
INSTALL = "matplotlib is not installed: pip install matplotlib"
# matplotlib's own font has no Chinese, Japanese or Korean: the first of these that is installed helps out
CJK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei"),
    *("WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS"),
)
TRAINING, HELD_BACK, QUIET = "#2f6db3", "#d1495b", "#8a8f98"
EVENT_COLOURS = {"resume": "#5a9e5a", "bad_update": "#b3261e", "spike": "#e08e1b"}
OTHER_EVENTS = ("#7b5ea7", "#3b8f91", "#8c6d46", "#c2569b")
SMOOTHED, WIDEST = 60, 50  # entries from which on a median is drawn over the single ones; the most on either side of it


# --- reading ----------------------------------------------------------------------------------------------------------


def read_metrics(path: str | Path) -> list[dict]:
    """The entries of a metrics file, without a last line that a crash has torn.

    Raises:
        ValueError: it is no such file, or holds no entry yet.
        OSError: it cannot be read.
    """
    path = Path(path)
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except ValueError:
            if number < len(lines) or number == 1:
                raise ValueError(_no_metrics(path)) from None
    if not all(isinstance(entry, dict) and "update" in entry for entry in entries):
        raise ValueError(_no_metrics(path))
    if not entries:
        raise ValueError(f"{path} holds no entry yet: the first one comes with the first log line")
    return entries


def _no_metrics(path: Path) -> str:
    return f"{path} is no metrics file of a run: pass a run's folder, its {METRICS}, or an older *.metrics.jsonl"


def x_values(entries: list[dict], x: str) -> list[float]:
    """Where each entry stands on the x axis; tokens are counted up, as an entry has those since the one before."""
    if x == "tokens":
        return list(accumulate(entry.get("tokens", 0) for entry in entries))
    return [entry["update" if x == "updates" else x] for entry in entries]


def points(entries: list[dict], x: str, key: str) -> tuple[list[float], list[float]]:
    """(xs, values) of the entries that hold a finite number under that key."""
    pairs = [(at, entry.get(key)) for at, entry in zip(x_values(entries, x), entries, strict=True)]
    pairs = [(at, value) for at, value in pairs if isinstance(value, (int, float)) and math.isfinite(value)]
    return [at for at, _ in pairs], [value for _, value in pairs]


def running_median(values: list[float], window: int) -> list[float]:
    """The median of each value and its neighbours, `window` in all; nearer to an end as many on either side as fit.

    A mean would be lifted by a spike for as long as the window is, and bent at the steep beginning of a loss.
    """
    last = len(values) - 1
    widths = (min(window // 2, i, last - i) for i in range(len(values)))
    return [median(values[i - width : i + width + 1]) for i, width in enumerate(widths)]


def run_name(path: str | Path) -> str:
    """The name of a run: its folder's, or what stands before `.metrics.jsonl` in an older file's."""
    path = Path(path)
    return path.resolve().parent.name if path.name == METRICS else path.name.split(".")[0]


def readable(name: str) -> str:
    """A name as matplotlib shows it: a dollar sign begins no formula, a leading underscore hides no label."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


# --- drawing ----------------------------------------------------------------------------------------------------------


@contextmanager
def drawing():
    """Fonts for any language, and no warning about a character that none of them has: it becomes a box.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    families = ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]
    with warnings.catch_warnings(), matplotlib.rc_context({"font.family": families}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_figure(width: float, height: float):
    """A matplotlib figure, in inches, that needs no window and leaves alone what else this process draws."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: str | Path) -> None:
    """Write the picture whole or not at all, in the format that the name ends in, png if none."""
    kind = Path(path).suffix.lstrip(".") or "png"
    atomic_write(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=110))


def draw(axis, entries: list[dict], x: str, name: str) -> None:
    """Training loss as a line, held-back loss as dots of the same colour."""
    colour, name = None, readable(name)
    for key, label, mark in (("loss", "training", "-"), ("val_loss", "held back", "o")):
        xs, values = points(entries, x, key)
        if values:
            style = {"linewidth": 1, "markersize": 4, "color": colour, "alpha": 0.5 if name and key == "loss" else 1}
            (line,) = axis.plot(xs, values, mark, label=f"{name} {label}" if name else label, **style)
            colour = line.get_color() if name else None
    axis.set(xlabel=X_AXES[x])


def draw_curves(metrics_path: str | Path, out_path: str | Path) -> Path | None:
    """Draw a run's curves; None, with a line that says why, where that cannot be: no picture is worth a run.

    Args:
        metrics_path: its metrics.jsonl; out_path: the picture, .png or .svg.
    """
    try:
        entries = read_metrics(metrics_path)
        with drawing():
            save_figure(curves_figure(entries, run_name(metrics_path)), out_path)
    except ImportError:
        print(f"no curves drawn: {INSTALL}")
        return None
    except (OSError, ValueError) as error:
        print(f"no curves drawn: {error}")
        return None
    return Path(out_path)


def curves_figure(entries: list[dict], name: str):
    """The figure of draw_curves: the losses above, the small panels that there are numbers for below."""
    small = {
        "lr": ("learning rate", "linear"),
        "grad_norm": ("gradient norm", "log"),
        "tokens_per_second": ("tokens per second", "linear"),
    }
    small = {key: how for key, how in small.items() if points(entries, "updates", key)[1]}
    figure = new_figure(10, 7 if small else 4.6)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    grid = figure.add_gridspec(2 if small else 1, max(len(small), 1), height_ratios=[2, 1] if small else [1])
    top = figure.add_subplot(grid[0, :])
    draw_losses(top, entries)
    axes = [top]
    for column, (key, (title, scale)) in enumerate(small.items()):
        axis = figure.add_subplot(grid[1, column])
        draw_panel(axis, entries, key, title, scale)
        axes.append(axis)
    draw_events(axes, entries)
    last = entries[-1]["update"]
    for axis in axes:
        axis.set(xlabel="updates", xlim=(0, max(last, 1) * 1.02))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    top.legend(frameon=False, loc="upper right")
    figure.suptitle(readable(name), fontsize=12)
    return figure


def draw_losses(axis, entries: list[dict]) -> None:
    """Training loss, smoothed where there is much of it, and the held-back loss with its best value."""
    xs, values = points(entries, "updates", "loss")
    if len(values) >= SMOOTHED:
        axis.plot(xs, values, color=TRAINING, alpha=0.3, linewidth=0.8)
        values = running_median(values, min(len(values) // 40, WIDEST) * 2 + 1)
    if values:
        axis.plot(xs, values, ".-" if len(values) == 1 else "-", color=TRAINING, linewidth=1.6, label="training")
    xs, values = points(entries, "updates", "val_loss")
    if values:
        axis.plot(xs, values, "o-", color=HELD_BACK, markersize=4.5, linewidth=1, label="held back")
        best = min(range(len(values)), key=values.__getitem__)
        label = f"best held back: {values[best]:.3f} at update {xs[best]:,}"
        axis.plot(xs[best], values[best], "o", color=HELD_BACK, markersize=10, fillstyle="none", label=label)
    axis.set(ylabel="loss (nats per token)")


def draw_panel(axis, entries: list[dict], key: str, title: str, scale: str) -> None:
    """One small panel; on a linear scale from zero."""
    xs, values = points(entries, "updates", key)
    from matplotlib.ticker import LogFormatter

    axis.plot(xs, values, ".-" if len(values) == 1 else "-", color=TRAINING, linewidth=1)
    if scale == "log" and any(value > 0 for value in values):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(LogFormatter())  # 20, where the one by default says 2 x 10^1
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    else:
        axis.set_ylim(bottom=0)
        axis.ticklabel_format(axis="y", scilimits=(-2, 6))
    axis.set_title(title, fontsize=10)


def draw_events(axes, entries: list[dict]) -> None:
    """A mark at the foot of the loss for each thing that happened, and a faint line through all panels."""
    # (an event is written with the next log line, and says which update it was, if it was not that one)
    events = [(entry.get("number", entry["update"]), str(entry["event"])) for entry in entries if "event" in entry]
    spare = iter(OTHER_EVENTS * (1 + len(events) // len(OTHER_EVENTS)))
    for kind, number in Counter(kind for _, kind in events).items():
        xs = [at for at, its_kind in events if its_kind == kind]
        colour = EVENT_COLOURS.get(kind) or next(spare)
        label = readable(kind.replace("_", " ")) + (f" ({number})" if number > 1 else "")
        at_foot = axes[0].get_xaxis_transform()
        axes[0].plot(
            xs, [0.0] * len(xs), "^", color=colour, markersize=8, transform=at_foot, clip_on=False, label=label
        )
        for axis in axes:
            axis.vlines(xs, 0, 1, transform=axis.get_xaxis_transform(), color=colour, linewidth=0.8, alpha=0.35)
