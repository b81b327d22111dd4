"""Draw the loss curves of one or more runs, training and held-back, from their metrics files.

python scripts/plot_metrics.py out/pretrain_256.metrics.jsonl out/full_sft_256.metrics.jsonl --out curves.png
python scripts/plot_metrics.py out/a_256.metrics.jsonl out/b_256.metrics.jsonl --out b.png --together tokens seconds
"""

import argparse
import json
import sys
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.weights import atomic_write
from trainer.arguments import friendly_errors, input_path, output_path

X_AXES = {"updates": "updates", "tokens": "trained tokens", "seconds": "seconds of training"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("metrics", nargs="+", help="metrics files that training wrote beside its weights")
    parser.add_argument("--out", required=True, type=output_path, help="picture to write, .png or .svg")
    parser.add_argument(
        "--together", nargs="+", choices=X_AXES, help="all runs in one picture, against each of these in turn"
    )
    return parser.parse_args(argv)


def read_metrics(path: Path) -> list[dict]:
    """The entries of a metrics file; raises ValueError where it is no such file."""
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if entries and all("update" in entry for entry in entries):
            return entries
    except json.JSONDecodeError:
        pass
    raise ValueError(f"{path} is no metrics file of a run: those end in .metrics.jsonl and lie beside the weights")


def x_values(entries: list[dict], x: str) -> list[float]:
    """Where each entry stands on the x axis; tokens are counted up, as an entry has those since the one before."""
    if x == "tokens":
        return list(accumulate(entry.get("tokens", 0) for entry in entries))
    return [entry["update" if x == "updates" else x] for entry in entries]


def draw(axis, entries: list[dict], x: str, name: str) -> None:
    """Training loss as a line, held-back loss as dots of the same colour."""
    colour, xs = None, x_values(entries, x)
    for key, label, mark in (("loss", "training", "-"), ("val_loss", "held back", "o")):
        points = [(at, entry[key]) for at, entry in zip(xs, entries, strict=True) if key in entry]
        if points:
            style = {"linewidth": 1, "markersize": 5, "color": colour, "alpha": 0.5 if name and key == "loss" else 1}
            (line,) = axis.plot(*zip(*points, strict=True), mark, label=f"{name} {label}".strip(), **style)
            colour = line.get_color() if name else None
    axis.set(xlabel=X_AXES[x])


def main(args):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = {name: read_metrics(input_path(name)) for name in args.metrics}
    columns = args.together or args.metrics
    figure, axes = plt.subplots(1, len(columns), figsize=(5.5 * len(columns), 3.6), squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        for name, entries in runs.items() if args.together else [(column, runs[column])]:
            title = Path(name).name.split(".")[0]
            draw(axis, entries, column if args.together else "updates", title if args.together else "")
        if not args.together:
            axis.set(title=Path(column).name.split(".")[0])
        axis.set(ylabel="loss (nats per token)")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    suffix = args.out.suffix.lstrip(".") or "png"
    atomic_write(args.out, lambda temporary: figure.savefig(temporary, format=suffix, dpi=80))
    print(args.out)


if __name__ == "__main__":
    with friendly_errors():
        main(parse_args())
