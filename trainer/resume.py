"""Whether a run can go on from a checkpoint, and what has changed since it was written."""

from __future__ import annotations

import math
from pathlib import Path

# another value of these would train rows twice or never, or give the optimizer a state that is not its own
FIXED = {
    "max_seq_len": "rows would be trained twice or never",
    "packing": "rows would be trained twice or never",
    "seed": "rows would be trained twice or never",
    "streaming": "rows would be trained twice or never",
    "optimizer": "its state fits no other",
    "freeze": "the optimizer's state is of other parameters",
    "param_groups": "the optimizer's state is of other parameters",
}
MAY_CHANGE = {"dropout", "inference_rope_scaling"}
# not worth a word: where and how fast, not what
UNSAID = {"from_resume", "chosen", "batch_size", "accumulation_steps", "device", "num_workers", "cache_dir", "stage"}


def rows_per_update(args, world_size: int) -> int:
    """Rows of all processes that make one update."""
    return args.batch_size * args.accumulation_steps * world_size


def keep_rows_per_update(path: Path, state: dict, args, world_size: int, say) -> int:
    """How many rows made an update when the checkpoint was written, with batch size and accumulation set to match.

    Another number of processes then makes the same updates of the same rows, so nothing is trained twice or never.

    Raises:
        ValueError: --batch_size and --accumulation_steps say otherwise.
    """
    saved = state["args"]
    typed = state.get("typed") or [saved["batch_size"], saved["accumulation_steps"]]
    wanted = state.get("rows_per_update") or math.prod(typed) * state["world_size"]
    if rows_per_update(args, world_size) == wanted:
        return wanted
    if [args.batch_size, args.accumulation_steps] != typed:
        raise ValueError(
            f"{path} was written with --batch_size {typed[0]} --accumulation_steps {typed[1]}, {wanted} rows per "
            f"update on {state['world_size']} process(es); now {rows_per_update(args, world_size)}: rows would be "
            f"trained twice or never. Pass flags that make {wanted}, or start anew with --from_resume 0"
        )
    args.batch_size = min(args.batch_size, math.ceil(wanted / world_size))
    args.accumulation_steps = math.ceil(wanted / (args.batch_size * world_size))
    say(
        f"note: {world_size} process(es) from now on: each update stays one of {wanted} rows, by --batch_size "
        f"{args.batch_size} --accumulation_steps {args.accumulation_steps}"
    )
    return wanted


def check_resumable(path: Path, state: dict, args, data: dict, model: dict, code: dict, say) -> None:
    """Say what has changed since the checkpoint was written.

    Args:
        data: counts and digest of what is trained on now; model: its configuration; code: what
            `trainer.record.code_version` says.

    Raises:
        ValueError: its place in the data means nothing now, or its optimizer is another one.
    """
    saved, now = state["args"], plain(args)
    for name, why in FIXED.items():
        if name in saved and saved[name] != now[name]:
            raise ValueError(
                f"{path} was written with --{name} {_typed(saved[name])}, now it is {_typed(now[name])}: {why}. Pass "
                f"--{name} {_typed(saved[name])}, or start anew with --from_resume 0"
            )
    then = state.get("data") or {}
    changed = [f"{name} {then[name]} (now {value})" for name, value in data.items() if then.get(name, value) != value]
    if changed:
        raise ValueError(
            f"{path} was written with other data, {', '.join(changed)}: continue with the same data, or start anew "
            "with --from_resume 0 --from_weight"
        )
    before = state.get("model_config") or {}
    names = [name for name in model.keys() - MAY_CHANGE if before.get(name, model[name]) != model[name]]
    changed = [f"{name} {before[name]} (now {model[name]})" for name in sorted(names)]
    if changed:
        raise ValueError(
            f"{path} was written with another model, {', '.join(changed)}: leave those flags away, or start anew with "
            "--from_resume 0"
        )
    # (what `auto` stood for goes on)
    for name in sorted(now.keys() & saved.keys() - UNSAID - FIXED.keys() - set(args.chosen)):
        if saved[name] != now[name]:
            say(f"note: --{name} was {saved[name]} before the resume and is {now[name]} from now on")
    for name in ("commit", "digest"):
        was, is_now = (state.get("code") or {}).get(name), code.get(name)
        if was and is_now and was != is_now:
            say(f"note: the code has changed since the checkpoint ({name} {was[:12]}, now {is_now[:12]})")
            return


def minimind_share(path: Path, state: dict, documents: int, batch_size: int, say) -> float:
    """How much of its epoch a checkpoint of MiniMind has done, and what it does not say.

    It counts batches of its own padded rows, of a size and in an order that it does not record.
    """
    share = min(state["step"] * batch_size * state["world_size"] / max(documents, 1), 1.0)
    say(
        f"continuing MiniMind's {path.name}: weights (in half precision), AdamW's moments, epoch {state['epoch'] + 1}. "
        f"Its {state['step']} batches are taken for {share:.1%} of the epoch. Which rows they held is not recorded, so "
        "some of this epoch may be trained twice, and others not"
    )
    return share


def describe(path: Path, state: dict, step: int, steps: int) -> str:
    """What was found, in one line."""
    loss = state.get("metrics", {}).get("loss")
    known = f", loss {loss:.4f}" if loss is not None else ""
    place = f"epoch {state['epoch'] + 1}, step {step}/{steps}"
    return f"resumed {path.name}: {place}{known}, written {state['age'] / 60:.0f} min ago"


def plain(args) -> dict:
    """The arguments as JSON and weights_only=True can hold them."""

    def value_of(value):
        if isinstance(value, (list, tuple)):
            return [value_of(item) for item in value]
        return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)

    return {name: value_of(value) for name, value in vars(args).items()}


def _typed(value) -> str:
    """As it is typed on a command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
