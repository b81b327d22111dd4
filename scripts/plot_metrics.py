"""Draw the loss curves of one or more runs, training and held-back, from their metrics files.

python scripts/plot_metrics.py out/pretrain_256.metrics.jsonl out/full_sft_256.metrics.jsonl --out curves.png
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.weights import atomic_write
from trainer.arguments import friendly_errors, input_path, output_path


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("metrics", nargs="+", help="metrics files that training wrote beside its weights")
    parser.add_argument("--out", required=True, type=output_path, help="picture to write, .png or .svg")
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


def main(args):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(args.metrics), figsize=(5.5 * len(args.metrics), 3.6), squeeze=False)
    for axis, name in zip(axes[0], args.metrics, strict=True):
        entries = read_metrics(input_path(name))
        for key, label, mark in (("loss", "training", "-"), ("val_loss", "held back", "o")):
            points = [(entry["update"], entry[key]) for entry in entries if key in entry]
            if points:
                axis.plot(*zip(*points, strict=True), mark, label=label, linewidth=1, markersize=5)
        axis.set(title=Path(name).name.split(".")[0], xlabel="updates", ylabel="loss (nats per token)")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    suffix = args.out.suffix.lstrip(".") or "png"
    atomic_write(args.out, lambda temporary: figure.savefig(temporary, format=suffix, dpi=80))
    print(args.out)


if __name__ == "__main__":
    with friendly_errors():
        main(parse_args())
