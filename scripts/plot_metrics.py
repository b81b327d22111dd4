"""Draw the curves of a run, or the losses of several, training and held-back, from their folders or metrics files.

python scripts/plot_metrics.py out/runs/pretrain_256-20260131-181502
python scripts/plot_metrics.py out/runs/a out/runs/b --together updates --out x.png
python scripts/plot_metrics.py out/runs/a out/runs/b out/old_256.metrics.jsonl --together tokens seconds --out x.svg
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.arguments import friendly_errors, input_path, output_path
from trainer.curves import (
    INSTALL,
    METRICS,
    X_AXES,
    curves_figure,
    draw,
    drawing,
    new_figure,
    read_metrics,
    readable,
    run_name,
    save_figure,
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("metrics", nargs="+", help="folders of runs, or metrics files")
    parser.add_argument(
        "--out", type=output_path, help="picture to write, .png or .svg; one folder alone gets its curves.png"
    )
    parser.add_argument(
        "--together", nargs="+", choices=X_AXES, help="all runs in one picture, against each of these in turn"
    )
    return parser.parse_args(argv)


def metrics_file(name: str) -> Path:
    """The metrics file that a folder or a file stands for.

    Raises:
        FileNotFoundError, ValueError: there is nothing of that name; a folder that is no run's.
    """
    path = input_path(name)
    if not path.is_dir():
        return path
    if not (path / METRICS).exists():
        raise ValueError(f"{path} is no folder of a run, it has no {METRICS}: pass one of those in out/runs")
    return path / METRICS


def names_of(paths: list[Path]) -> list[str]:
    """What the runs are called in the picture: as short as tells them apart."""
    names = [run_name(path) for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def losses_figure(runs: list[tuple[str, list[dict]]], together: list[str] | None):
    """One panel for each run, or for each x axis that all runs share."""
    columns = together or runs
    figure = new_figure(5.5 * len(columns), 3.8)
    for number, column in enumerate(columns, 1):
        axis = figure.add_subplot(1, len(columns), number)
        for name, entries in runs if together else [column]:
            draw(axis, entries, column if together else "updates", name if together else "")
        if not together:
            axis.set_title(readable(column[0]))
        axis.set(ylabel="loss (nats per token)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def main(args):
    paths = list(dict.fromkeys(metrics_file(name) for name in args.metrics))
    one_folder = len(paths) == 1 and paths[0].name == METRICS and not args.together
    if not one_folder and args.out is None:
        raise ValueError("--out is missing: name the picture to write, such as --out curves.png")
    runs = list(zip(names_of(paths), map(read_metrics, paths), strict=True))
    out = args.out or paths[0].with_name("curves.png")
    try:
        with drawing():
            figure = curves_figure(runs[0][1], runs[0][0]) if one_folder else losses_figure(runs, args.together)
            save_figure(figure, out)
    except ImportError:
        raise ValueError(INSTALL) from None
    print(out)


if __name__ == "__main__":
    with friendly_errors():
        main(parse_args())
