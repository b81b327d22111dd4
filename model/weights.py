"""Weight files: their names, their sidecar, how they are written whole or not at all, and how they are read back.

Weights are `out/{name}_{hidden_size}{_moe}.pth`, a plain state_dict as MiniMind writes it, and beside it a `.json` that
says what they are: configuration, digest, stage, tokenizer, data, arguments, metrics, versions. So nobody who loads
them has to know their sizes, and a pair that does not belong together is noticed. MiniMind's own files, which have no
sidecar, are recognised by their keys and shapes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import shutil
import tempfile
from pathlib import Path

import torch
import transformers

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.presets import V3, V3_MOE

SAVE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# --- names ------------------------------------------------------------------------------------------------------------


def weight_path(save_dir: str | Path, name: str, config: MiniMindConfig) -> Path:
    """`{save_dir}/{name}_{hidden_size}{_moe}.pth`, as MiniMind names its files."""
    return Path(save_dir) / f"{name}_{config.hidden_size}{'_moe' if config.use_moe else ''}.pth"


def sidecar_path(path: str | Path) -> Path:
    return Path(path).with_suffix(".json")


def find_weights(save_dir: str | Path, name: str, hidden_size: int | None = None, use_moe: bool | None = None) -> Path:
    """The weights of that name, of the given size or, where none is given, the newest of any size.

    Raises:
        FileNotFoundError: names the place, the sizes that are there, and what to do.
    """
    save_dir = Path(save_dir)
    sizes = {path: _size_of(path, name) for path in save_dir.glob(f"{name}_*.pth")}
    sizes = {path: size for path, size in sizes.items() if size}
    fitting = [
        path for path, (hidden, moe) in sizes.items() if hidden_size in (None, hidden) and use_moe in (None, moe)
    ]
    if fitting:
        return max(fitting, key=lambda path: path.stat().st_mtime)
    wanted = save_dir / f"{name}_{hidden_size or '*'}{'_moe' if use_moe else ''}.pth"
    others = ", ".join(sorted(path.name for path in sizes))
    remedy = f"there is {others}: pass its --hidden_size or --preset" if others else f"train the {name} stage first"
    raise FileNotFoundError(f"no weights at {wanted}: {remedy}, or pass another name or --save_dir")


def _size_of(path: Path, name: str) -> tuple[int, bool] | None:
    """(hidden size, MoE) out of a file name, or None if the file is of another name that begins alike."""
    rest = path.stem[len(name) + 1 :]
    moe = rest.endswith("_moe")
    rest = rest.removesuffix("_moe")
    return (int(rest), moe) if rest.isdigit() else None


# --- writing ----------------------------------------------------------------------------------------------------------


def atomic_write(path: str | Path, write) -> None:
    """Let `write(temporary_path)` write a file, then put it in place of `path` in one step.

    The temporary file lies in the same folder; if anything fails it is removed and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".tmp")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Have the system write the new name down too, or a power cut could undo it (Windows has no such call)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(content: dict, path: str | Path) -> None:
    """torch.save that raises OSError where the disk is full: torch's own error does not say so."""
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            cause = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        file.flush()
        os.fsync(file.fileno())


def sweep_temporaries(path: str | Path) -> None:
    """Remove what atomic_write left of `path`, its sidecar and its older versions when its process was killed.

    Only where nobody else writes those files.
    """
    path = Path(path)
    for left in path.parent.glob(f"{glob.escape(path.stem)}.*.tmp"):
        left.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, content: dict) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2, default=str) + "\n"
    atomic_write(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8", newline="\n"))


def save_weights(
    path: str | Path,
    state_dict: dict[str, torch.Tensor],
    config: MiniMindConfig,
    dtype: str = "float32",
    keep_previous: bool = False,
    **metadata,
) -> None:
    """Write weights and sidecar so that every moment leaves a pair that can be loaded.

    The new sidecar is laid down as `.json.next` before the weights change and renamed after: a crash in between leaves
    new weights with the old `.json`, and the reader then finds the `.next` that belongs to them.

    Args:
        dtype: float32, or a half precision that halves the file but loses what small learning rates later add.
        keep_previous: keep an existing pair as `.prev.pth` and `.prev.json`.
        metadata: JSON-able facts for the sidecar: stage, tokenizer, data, arguments, metrics.
    """
    path = Path(path)
    _settle(path)
    if keep_previous and path.exists():
        for old in (sidecar_path(path), path):
            if old.exists():
                previous = old.with_suffix(".prev" + old.suffix)
                atomic_write(previous, lambda temporary, old=old: shutil.copyfile(old, temporary))
    # a dict by storage keeps tied tensors tied in the file
    converted = {}
    for tensor in state_dict.values():
        if (tensor.data_ptr(), tensor.shape) not in converted:
            converted[tensor.data_ptr(), tensor.shape] = tensor.detach().to("cpu", SAVE_DTYPES[dtype])
    tensors = {name: converted[tensor.data_ptr(), tensor.shape] for name, tensor in state_dict.items()}
    next_sidecar = _next_sidecar(path)

    def write(temporary):
        save_tensors(tensors, temporary)
        sidecar = {
            "digest": file_digest(temporary),
            "config": config_dict(config),
            "dtype": dtype,
            **metadata,
            "versions": versions(),
        }
        write_json(next_sidecar, sidecar)

    atomic_write(path, write)
    os.replace(next_sidecar, sidecar_path(path))


def _next_sidecar(path: Path) -> Path:
    return sidecar_path(path).with_suffix(".json.next")


def _settle(path: Path) -> None:
    """Finish a save that was cut off between its two renames, so that the next one starts from a matching pair."""
    waiting = _next_sidecar(path)
    if path.exists() and waiting.exists() and _read_json(waiting).get("digest") == file_digest(path):
        os.replace(waiting, sidecar_path(path))


def update_sidecar(path: str | Path, **metadata) -> None:
    """Change facts in the sidecar of weights that stay as they are."""
    _settle(Path(path))
    sidecar = _read_json(sidecar_path(path))
    write_json(sidecar_path(path), {**sidecar, **metadata})


def config_dict(config: MiniMindConfig) -> dict:
    """The configuration's own fields, without what transformers adds to every config."""
    own = MiniMindConfig.__init__.__annotations__
    return {name: value for name, value in config.to_dict().items() if name in own}


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def file_digest(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tokenizer_digest(tokenizer) -> str:
    """sha256 over the vocabulary: token strings and their ids."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()


# --- reading ----------------------------------------------------------------------------------------------------------


def read_sidecar(path: str | Path) -> dict | None:
    """The sidecar of a weight file, or None where there is none (MiniMind's own files).

    Raises:
        ValueError: the sidecar belongs to other weights.
    """
    path = Path(path)
    candidates = [sidecar_path(path), _next_sidecar(path)]
    sidecars = [_read_json(file) for file in candidates if file.exists()]
    if not sidecars:
        return None
    digest = file_digest(path)
    for sidecar in sidecars:
        if sidecar.get("digest") == digest:
            return sidecar
    raise ValueError(
        f"{candidates[0]} describes other weights than {path.name} (its digest differs): put the right pair together, "
        "or remove the .json to have the configuration detected from the weights"
    )


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is no JSON ({error}): remove it to have the weights' configuration detected"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no facts about weights: remove it to have their configuration detected")
    return content


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a weight file, raised to fp32, nothing executed.

    Raises:
        FileNotFoundError, ValueError: no such file; not a file of weights (torn, an LFS pointer, another format).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: train that stage first, or pass another name")
    with open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise ValueError(f"{path} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds here, all of which mean the same to the user
        raise ValueError(
            f"{path} cannot be read as weights: it is torn (copy or train it again), another format, or holds Python "
            f"objects, which are never loaded ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state_dict of tensors (a resume file? those live in checkpoints/)")
    return {name: tensor.float() for name, tensor in state.items()}


def load_config(path: str | Path, overrides: dict | None = None, say=print) -> MiniMindConfig:
    """The configuration of a weight file: its sidecar's, or detected, with what the user stated laid over it.

    Raises:
        ValueError: the user's sizes contradict the sidecar's.
    """
    sidecar = read_sidecar(path)
    if sidecar is None:
        return detect_config(read_state_dict(path), path, overrides, say)
    return _config_of(sidecar, path, overrides or {})


def _config_of(sidecar: dict, path: str | Path, overrides: dict) -> MiniMindConfig:
    config = MiniMindConfig(**sidecar["config"])
    for name, value in overrides.items():
        if getattr(config, name) != value and name in _SHAPING:
            raise ValueError(
                f"{path} has {name} {getattr(config, name)}, not {value}: leave the flag away (the sizes are read from "
                f"{sidecar_path(path).name}), or choose other weights"
            )
        setattr(config, name, value)
    return config


# what cannot change without changing the meaning of the weights; the rest (dropout, YaRN, top-k) may be overridden
_SHAPING = {
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "qk_norm",
    "mlp_gate",
    "use_moe",
    "n_routed_experts",
    "n_shared_experts",
    "moe_intermediate_size",
}


def detect_config(state: dict, path: str | Path = "these weights", overrides=None, say=print) -> MiniMindConfig:
    """The configuration of MiniMind's own files of either generation, by keys and shapes.

    What shapes cannot show takes its generation's default unless `overrides` states it, and `say` is told.

    Raises:
        ValueError: the keys are not MiniMind's, or `overrides` contradicts the shapes.
    """
    overrides = overrides or {}
    layer = "model.layers.0."
    use_moe = layer + "mlp.gate.weight" in state
    mlp = layer + ("mlp.experts.0.gate_proj.weight" if use_moe else "mlp.gate_proj.weight")
    attention = [f"{layer}self_attn.{name}_proj.weight" for name in "qk"]
    for key in ("model.embed_tokens.weight", *attention, mlp):
        if key not in state:
            raise ValueError(f"{path} has no {key}: these are no MiniMind weights ({_some(state)})")
    vocab_size, hidden_size = state["model.embed_tokens.weight"].shape
    v3 = layer + "self_attn.q_norm.weight" in state
    fields = dict(V3) if v3 else {"num_attention_heads": 8, "rms_norm_eps": 1e-5}
    fields |= {"rope_theta": 1e6}
    if use_moe:
        fields |= V3_MOE if v3 else {"num_experts_per_tok": 2, "seq_aux": True}
    assumed = {**fields, **overrides}
    queries = state[layer + "self_attn.q_proj.weight"].size(0)
    if v3:
        head_dim = state[layer + "self_attn.q_norm.weight"].numel()
    else:
        head_dim = overrides.get("head_dim") or queries // assumed["num_attention_heads"]
    seen = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": 1 + max(int(key.split(".")[2]) for key in state if key.startswith("model.layers.")),
        "head_dim": head_dim,
        "num_attention_heads": queries // head_dim,
        "num_key_value_heads": state[layer + "self_attn.k_proj.weight"].size(0) // head_dim,
        "qk_norm": v3,
        "use_moe": use_moe,
        "mlp_gate": any(key.endswith("output_gate.weight") for key in state),
        "tie_word_embeddings": torch.equal(
            state.get("lm_head.weight", state["model.embed_tokens.weight"]), state["model.embed_tokens.weight"]
        ),
        **_detect_mlp(state, layer, use_moe),
    }
    wrong = [f"{name} {seen[name]}, not {value}" for name, value in overrides.items() if seen.get(name, value) != value]
    if wrong:
        raise ValueError(f"{path} has {'; '.join(wrong)}: leave those flags away, or choose other weights")
    config = MiniMindConfig(**{**fields, **overrides, **seen})
    guessed = {
        name: assumed[name] for name in assumed if name not in seen or (name == "num_attention_heads" and not v3)
    }
    say(
        f"{path}: no sidecar; detected MiniMind {'v3' if v3 else 'v2'} weights, hidden_size {hidden_size}, "
        f"{config.num_hidden_layers} layers{', mixture of experts' if use_moe else ''}. Not visible in the shapes, "
        f"taken as usual (override by the flag of that name): {', '.join(f'{k} {v}' for k, v in guessed.items())}. "
        "Such weights need the tokenizer that they were trained with: pass its folder as --tokenizer_path"
    )
    return config


def _detect_mlp(state: dict, layer: str, use_moe: bool) -> dict:
    """Widths of the MLP and, for a mixture, the numbers of experts."""
    if not use_moe:
        return {"intermediate_size": state[layer + "mlp.gate_proj.weight"].size(0)}
    width = state[layer + "mlp.experts.0.gate_proj.weight"].size(0)
    shared = {key.split(".")[5] for key in state if key.startswith(layer + "mlp.shared_experts.")}
    return {
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "n_routed_experts": state[layer + "mlp.gate.weight"].size(0),
        "n_shared_experts": len(shared),
    }


def load_state(model: torch.nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load strictly; a difference is told by key and shape, with what to pass.

    Raises:
        ValueError: keys are missing, left over, or of another shape.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    if missing == ["lm_head.weight"] and model.config.tie_word_embeddings:
        missing = []
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key}: file {tuple(state[key].shape)}, model {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{path} does not fit the model. Only in the model: {_some(missing)}. Only in the file: "
            f"{_some(unexpected)}. Other shapes: {_some(shapes)}. Pass the --hidden_size, --num_hidden_layers, "
            "--use_moe or --preset that the weights were trained with"
        )
    model.load_state_dict(state, strict=False)


def _some(names) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"


def load_model(path: str | Path, overrides: dict | None = None, tokenizer=None, say=print) -> MiniMindForCausalLM:
    """A model with the weights of a file, in fp32 on the CPU, in eval mode; its sizes come from the file.

    Args:
        overrides: config fields that the user stated.
        tokenizer: if given, it must be the one that the weights were trained with, as far as the sidecar knows.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no weights at {path}: train that stage first, or pass another name")
    state = read_state_dict(path)
    sidecar = read_sidecar(path)
    if sidecar is None:
        config, sidecar = detect_config(state, path, overrides, say), {}
    else:
        config = _config_of(sidecar, path, overrides or {})
    known = sidecar.get("tokenizer", {}).get("digest")
    if tokenizer is not None and known and known != tokenizer_digest(tokenizer):
        raise ValueError(
            f"{path} was trained with another tokenizer ({sidecar['tokenizer'].get('path', 'unknown')}): pass its "
            "folder as --tokenizer_path"
        )
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but {path} only {config.vocab_size}: pass the folder of the "
            "tokenizer that it was trained with as --tokenizer_path"
        )
    model = MiniMindForCausalLM(config)
    load_state(model, state, path)
    return model.eval()
