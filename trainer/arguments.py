"""Command-line flags that all stages share, and where a path that a user typed is looked for.

Imports nothing heavy, so that the data scripts can use the path functions without waiting for torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import contextmanager
from pathlib import Path

from trainer.env_config import set_defaults_from_environment

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_DIR = ROOT / "dataset" / "sample"
STOPPED = "stopped: the same command with --from_resume 1 continues from the last save"


def input_path(path: str | Path) -> Path:
    """Find an existing file or folder: as given from the working directory, else from the repository root.

    The design documents type `../dataset/x.jsonl` in `trainer/` and `./dataset/x.jsonl` in the root; both mean the same
    file, so leading `./` and `../` are dropped for the second look.

    Raises:
        FileNotFoundError: names both places and, where the repository has one, the sample file of that kind.
    """
    path = Path(path).expanduser()
    if path.exists():
        return path
    parts = [part for part in path.parts if part not in (".", "..")]
    from_root = path if path.is_absolute() else ROOT.joinpath(*parts)
    if from_root.exists():
        return from_root
    places = str(path) if path.is_absolute() else f"{Path.cwd() / path} or {from_root}"
    raise FileNotFoundError(f"no file at {places}: check the path{sample_hint(path.name)}")


def sample_hint(name: str) -> str:
    """A sentence that names the sample file which could stand in for a missing data file, or nothing."""
    for kind, sample in (("pretrain", "pretrain.jsonl"), ("identity", "identity.jsonl"), ("sft", "sft.jsonl")):
        if kind in name and (SAMPLE_DIR / sample).exists():
            return f", or try the sample data first: --data_path dataset/sample/{sample}"
    return ""


def data_source(path: str | Path) -> str:
    """Where rows come from: a file, found like any input, or else the name of a data set on the hub (`org/name`)."""
    try:
        return str(input_path(path))
    except FileNotFoundError:
        name = str(path)
        if name.count("/") == 1 and name[0] not in "./~" and not Path(name.split(":")[0]).suffix:
            return name
        raise


def weights_dir(path: str | Path) -> Path:
    """Like input_path, for a folder of weights: a missing one is returned, so that the missing weights are named."""
    try:
        return input_path(path)
    except FileNotFoundError:
        return output_path(path)


def output_path(path: str | Path) -> Path:
    """A path to write to: relative ones belong to the working directory (defaults are absolute, below the root)."""
    return Path(path).expanduser().absolute()


def cache_path(text: str) -> Path | None:
    """A folder for the token cache; the word none stands for no cache."""
    return None if text == "none" else output_path(text)


@contextmanager
def friendly_errors(stopped: str = "stopped"):
    """Turn a user's mistake (a missing file, a bad row, a wrong size) into one line and exit status 2; Ctrl-C into 130.

    MINIMIND_DEBUG=1 shows the whole traceback instead.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, MemoryError) as error:
        if os.environ.get("MINIMIND_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def zero_or_one(text: str) -> int:
    """0 or 1, also written as false/true, because `type=bool` would take the word "False" for true."""
    values = {"0": 0, "false": 0, "no": 0, "1": 1, "true": 1, "yes": 1}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 0 nor 1")
    return values[text.lower()]


def positive_int(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


# flag -> config field, for those whose names differ
_ALIASES = {"hidden_size": ["--dim"], "num_hidden_layers": ["--n_layers"], "n_routed_experts": ["--num_experts"]}
_MODEL_FLAGS = {
    "hidden_size": positive_int,
    "num_hidden_layers": positive_int,
    "num_attention_heads": positive_int,
    "num_key_value_heads": positive_int,
    "intermediate_size": positive_int,
    "use_moe": zero_or_one,
    "n_routed_experts": positive_int,
    "num_experts_per_tok": positive_int,
    "n_shared_experts": int,
    "rms_norm_eps": float,
    "rope_theta": float,
    "dropout": float,
}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model; all of them default to "not stated", so that weights can speak for themselves."""
    group = parser.add_argument_group("model (sizes are read from the weights where there are any)")
    group.add_argument("--preset", help="a named size: tiny, small, base, moe, minimind3, minimind3_moe")
    for name, kind in _MODEL_FLAGS.items():
        group.add_argument(f"--{name}", *_ALIASES.get(name, []), type=kind, default=None)
    group.add_argument("--inference_rope_scaling", action="store_true", help="stretch the context by YaRN, 16 times")


def stated_sizes(args: argparse.Namespace) -> dict:
    """The config fields that the user stated, by --preset or one by one (which wins)."""
    from model.presets import PRESETS

    if args.preset and args.preset not in PRESETS:
        raise ValueError(f"no preset {args.preset!r}: choose one of {', '.join(PRESETS)}")
    stated = dict(PRESETS[args.preset]) if args.preset else {}
    stated |= {name: getattr(args, name) for name in _MODEL_FLAGS if getattr(args, name) is not None}
    if "use_moe" in stated:
        stated["use_moe"] = bool(stated["use_moe"])
    if args.inference_rope_scaling:
        stated["inference_rope_scaling"] = True
    return stated


def add_speed_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how fast a run is, and change what it learns by no more than rounding."""
    add = parser.add_argument_group("speed").add_argument
    add("--device", default="auto", help="auto, cpu, cuda:0, mps")
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"], help="of the matrix products")
    add("--num_workers", type=int, default=-1, help="processes that prepare batches; -1: 0 on CPU and MPS, 2 on CUDA")
    add("--packing", type=zero_or_one, default=1, help="1: documents share rows, attention kept apart; 0: one to a row")
    add(
        "--cache_dir",
        default=os.environ.get("MINIMIND_CACHE_DIR", str(ROOT / "dataset" / ".cache")),
        type=cache_path,
        help="where token ids are kept for the next start (MINIMIND_CACHE_DIR); none: made in memory each time",
    )
    add(
        "--streaming",
        type=zero_or_one,
        default=0,
        help="1: tokenise on the way, for data too large for a cache; needs --max_steps",
    )
    add("--use_compile", default="auto", choices=["auto", "0", "1"], help="torch.compile; auto: where the run is long")
    add("--gradient_checkpointing", type=zero_or_one, default=0, help="1: less memory, a third more time")


def whole_number(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def number_from_zero(text: str) -> float:
    return 0.0 if text.strip() in ("0", "0.0") else positive_number(text)


def fraction(text: str) -> float:
    """A number from 0 up to, but not including, 1."""
    value = number_from_zero(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number below 1")
    return value


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is trained on, what is held back, and how often that is looked at."""
    add = parser.add_argument_group("data and validation").add_argument
    add("--data_path", nargs="+", help="rows to train on: .jsonl, .json, .gz of them, .parquet, .arrow or a hub name")
    add("--sample_ratio", type=number_from_zero, default=1.0, help="share of every source that is used")
    add("--sampling", default=None, help="JSON file: for each file name its ratio, max_samples and val_ratio")
    add("--on_bad_row", default="raise", choices=["raise", "skip"], help="what a row that cannot be used does")
    add("--tokenizer_path", default=str(ROOT / "model"), help="folder of the tokenizer")
    add("--max_seq_len", type=positive_int, help="tokens per row")
    add("--val_path", nargs="+", default=None, help="held-back rows: their loss, perplexity and bits per byte")
    add("--val_ratio", type=fraction, default=0.0, help="share of --data_path that is held back, chosen by content")
    add("--eval_interval", type=whole_number, default=0, help="updates between validations; 0: after each epoch")
    add("--patience", type=whole_number, default=0, help="stop after so many validations without gain; 0: never")
    add("--min_delta", type=number_from_zero, default=0.0, help="the smallest fall of that loss that is a gain")
    add("--sample_prompts", default=str(SAMPLE_DIR / "prompts.jsonl"), help="continued at each validation; or none")
    add("--regression_eval", type=zero_or_one, default=0, help="1: ask --regression_prompts and count right answers")
    add("--regression_interval", type=whole_number, default=500, help="updates between them; 0: at each validation")
    add("--regression_prompts", default=str(SAMPLE_DIR / "regression_prompts.jsonl"))


def add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how far and how fast the weights move."""
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive_int)
    add("--max_steps", type=whole_number, default=0, help="stop after so many updates; 0: after all epochs")
    add("--batch_size", type=positive_int, help="rows of --max_seq_len tokens per process and step")
    add("--accumulation_steps", type=positive_int, default=1, help="steps whose gradients make one update")
    add("--learning_rate", type=float, help="peak; reached after the warm-up")
    add("--lr_schedule", default="cosine", choices=["cosine", "linear", "step", "constant"], help="after the warm-up")
    add("--min_lr_ratio", type=fraction, default=0.1, help="what the schedule falls to, as a share of the peak")
    add("--warmup_ratio", type=fraction, default=0.05, help="share of the updates over which the learning rate rises")
    add("--warmup_steps", type=whole_number, help="updates over which it rises, instead of --warmup_ratio")
    add("--optimizer", default="adamw", choices=["adamw", "muon"], help="muon: for the matrices (torch 2.9 or later)")
    add("--weight_decay", type=number_from_zero, default=0.1, help="on matrices only, never on norms or embeddings")
    add("--grad_clip", type=positive_number, default=1.0, help="largest norm of the gradient")
    add("--label_smoothing", type=fraction, default=0.0, help="share of the target spread over all tokens in training")
    add("--freeze", nargs="+", default=[], metavar="PATTERN", help="parameters that stay, as in 'model.embed_tokens.*'")
    add(
        "--param_groups",
        nargs="+",
        default=[],
        metavar="PATTERN=RATE[,DECAY]",
        help="a factor for the learning rate of the parameters of that name, and their weight decay: '*.mlp.*=0.5,0'",
    )
    add("--seed", type=int, default=42)


def add_guard_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is kept, and what happens when something goes wrong."""
    add = parser.add_argument_group("saving and safety").add_argument
    add("--save_dir", "--out_dir", default=ROOT / "out", type=output_path, help="where the weights go")
    add("--checkpoint_dir", default=ROOT / "checkpoints", type=output_path, help="where the state to resume from goes")
    add("--save_weight", help="name of the weights that are written")
    add("--from_weight", help="name of the weights to start from, or none")
    add("--from_resume", type=zero_or_one, default=0, help="1: continue from the last checkpoint of this run")
    add(
        "--save_dtype",
        default="float32",
        choices=["float32", "float16", "bfloat16"],
        help="half precision loses what the small learning rates of later stages add",
    )
    add("--save_minutes", type=positive_number, default=5.0, help="minutes between saves; more where a save takes long")
    add("--save_interval", type=whole_number, default=0, help="updates between saves, instead of --save_minutes")
    add("--keep_checkpoints", type=positive_int, default=2, help="states to resume from that are kept")
    add("--max_bad_updates", type=positive_int, default=10, help="stop when so many in a row are not finite")
    add(
        "--oom_policy",
        default="raise",
        choices=["raise", "shrink"],
        help="out of GPU memory: shrink tries the same batch again in smaller pieces, with the same result",
    )
    add("--deterministic", type=zero_or_one, default=0, help="1: the same bits each time on a GPU, too; slower")
    add("--timeout_minutes", type=positive_number, default=30.0, help="how long processes wait for each other")


def add_record_flags(parser: argparse.ArgumentParser, stage: str) -> None:
    """The flags that say what a run tells, and where it writes it."""
    add = parser.add_argument_group("record").add_argument
    add("--log_interval", type=positive_int, default=10, help="updates between log lines")
    add("--runs_dir", default=None, type=output_path, help="where each run gets a folder; --save_dir/runs if not given")
    add("--monitor", default="light", choices=["off", "light", "full"], help="full: with activation statistics")
    add("--curves", type=zero_or_one, default=1, help="1: draw the curves when the run ends")
    add(
        "--use_wandb",
        nargs="?",
        const="wandb",
        default=None,
        choices=["wandb", "swanlab"],
        help="also log to wandb (offline unless an API key is set), or to swanlab where that is named",
    )
    add("--wandb_project", default=f"MiniMind-{stage.replace(' ', '-')}")


def stage_parser(stage: str, **defaults) -> argparse.ArgumentParser:
    """The parser with the flags that all training stages share.

    What is typed wins over the environment (trainer.env_config), that over --preset, that over the stage's defaults.

    Args:
        stage: its name for --help and for wandb.
        defaults: the stage's own defaults; save_weight, from_weight, data_path, epochs, batch_size, learning_rate and
            max_seq_len must be given.
    """
    parser = argparse.ArgumentParser(
        description=f"MiniMind {stage}", formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add_data_flags(parser)
    add_optimizer_flags(parser)
    add_speed_flags(parser)
    add_guard_flags(parser)
    add_record_flags(parser, stage)
    # an old spelling: torchrun is noticed by itself
    parser.add_argument("--ddp", action="store_true", help=argparse.SUPPRESS)
    add_model_flags(parser)
    parser.set_defaults(stage=stage, **defaults | {"data_path": [str(defaults["data_path"])]})
    set_defaults_from_environment(parser)
    return parser


def model_config(args: argparse.Namespace):
    """The configuration to train with: that of --from_weight where there is one, else what the flags say.

    Raises:
        FileNotFoundError, ValueError: no such weights; weights of other sizes than the flags state.
    """
    from model.model_minimind import MiniMindConfig
    from model.weights import find_weights, load_config

    stated = stated_sizes(args)
    if args.from_weight == "none":
        return MiniMindConfig(**stated)
    path = find_weights(args.save_dir, args.from_weight, stated.get("hidden_size"), stated.get("use_moe"))
    return load_config(path, stated)
