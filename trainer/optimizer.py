"""The optimizers of --optimizer: AdamW, or Muon for the matrices of linear layers with AdamW for everything else.

Which parameters move, how fast, and how much they decay is said by patterns of their names.

    python trainer/train_full_sft.py --freeze 'model.embed_tokens.*' --param_groups '*.mlp.*=0.5' '*norm*=2,0'

Muon is torch's own (https://kellerjordan.github.io/posts/muon/), its steps scaled to AdamW's size
(https://arxiv.org/abs/2502.16982, section 2.2), so that --learning_rate and --weight_decay mean the same for both.
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch


class MuonWithAdamW:
    """Muon and AdamW behind the methods of one optimizer; param_groups holds the groups of both."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer | None = None):
        self.parts = {"muon": muon} | ({"adamw": adamw} if adamw is not None else {})
        self.found_inf = None  # scalar, 1 where a gradient is not finite; set instead of waited for

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        before = []
        if self.found_inf is not None:  # AdamW's kernel leaves weights and moments alone; Muon's are put back
            if "adamw" in self.parts:
                self.parts["adamw"].found_inf = self.found_inf
            before = [(tensor, tensor.clone()) for tensor in self._moved_by_muon()]
        for part in self.parts.values():
            part.step()
        for tensor, value in before:
            tensor.copy_(torch.where(self.found_inf.bool(), value, tensor))

    def _moved_by_muon(self) -> list[torch.Tensor]:
        """Weights and momentum; a first gradient becomes zero if it is not finite, as there is no momentum to keep."""
        muon, tensors = self.parts["muon"], []
        for p in (p for group in muon.param_groups for p in group["params"] if p.grad is not None):
            tensors += [p.data, *(value for value in muon.state[p].values() if isinstance(value, torch.Tensor))]
            if not muon.state[p]:
                p.grad.masked_fill_(self.found_inf.bool(), 0.0)
        return tensors

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


# --- which parameters, by name ----------------------------------------------------------------------------------------


class Group(NamedTuple):
    """Parameters whose names fit `pattern`: learning rate times `rate`; weight decay `decay`, None: as for all."""

    pattern: str
    rate: float
    decay: float | None = None


def parse_groups(texts) -> list[Group]:
    """The groups of --param_groups, each `PATTERN=RATE[,DECAY]`.

    Raises:
        ValueError: no such form, a rate that is not above 0, a decay below 0.
    """
    groups = []
    for text in texts:
        pattern, _, numbers = text.rpartition("=")
        try:
            values = [float(number) for number in numbers.split(",")]
        except ValueError:
            values = []
        if not pattern or len(values) not in (1, 2) or not all(math.isfinite(v) and v >= 0 for v in values):
            raise ValueError(f"--param_groups {text!r} is not PATTERN=RATE[,DECAY]: write it as in '*.mlp.*=0.5,0'")
        if values[0] == 0:
            raise ValueError(f"--param_groups {text!r} has the rate 0: what shall stay goes to --freeze {pattern!r}")
        groups.append(Group(pattern, *values))
    return groups


def _names(model: torch.nn.Module) -> dict[torch.nn.Parameter, list[str]]:
    """The names of each parameter: a tied output layer is the embedding by another name."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _fits(names: list[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _nothing_fits(flag: str, pattern: str, names) -> ValueError:
    known = [names_of[0] for names_of in names.values()]
    some = ", ".join(known[:: max(len(known) // 4, 1)][:5])
    return ValueError(f"{flag} {pattern!r} fits no parameter: their names are {some}, ... (* stands for any text)")


def freeze(model: torch.nn.Module, patterns) -> list[str]:
    """Have the parameters whose names fit one of the patterns stay as they are; returns their names.

    Patterns are those of a shell (fnmatch). A tied parameter goes by each of its names and is returned by the first.

    Raises:
        ValueError: a pattern that fits none; nothing left to train. The model is left alone then.
    """
    names = _names(model)
    for pattern in patterns:
        if not any(_fits(names_of, pattern) for names_of in names.values()):
            raise _nothing_fits("--freeze", pattern, names)
    chosen = {p: n[0] for p, n in names.items() if any(_fits(n, pattern) for pattern in patterns)}
    if not any(p.requires_grad for p in names.keys() - chosen.keys()):
        raise ValueError(f"--freeze {' '.join(patterns)} leaves nothing to train: freeze less")
    for parameter in chosen:
        parameter.requires_grad_(False)
    return list(chosen.values())


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, groups=(), learning_rate: float | None = None
) -> list[dict]:
    """Groups for AdamW: first all that no pattern takes, matrices and then the rest, and so on for each pattern.

    Matrices are decayed; norms, biases and embeddings are not. The order is that of the patterns and of the model, as
    checkpoints know a parameter by its place.

    Args:
        groups: of parse_groups; a parameter goes with the first that fits. They need the learning rate of all others.

    Raises:
        ValueError: a pattern that fits no parameter, or none that is trained and still to be had.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    names = _names(model)
    taken, result = set(), []
    for group in groups:
        fitting = [p for p in names if _fits(names[p], group.pattern)]
        members = [p for p in fitting if p.requires_grad and p not in taken]
        if not fitting:
            raise _nothing_fits("--param_groups", group.pattern, names)
        if not members:
            raise ValueError(f"--param_groups {group.pattern!r} has no effect: what it fits is frozen or in one before")
        taken.update(members)
        decay, kept = (weight_decay, 0.0) if group.decay is None else (group.decay, group.decay)
        parts = _by_decay(members, embeddings, decay, kept)
        result += [part | {"lr": learning_rate * group.rate} for part in parts if part["params"]]
    rest = [p for p in model.parameters() if p.requires_grad and p not in taken]
    return _by_decay(rest, embeddings, weight_decay, 0.0) + result


def _by_decay(parameters, embeddings: set[int], decay: float, kept_decay: float) -> list[dict]:
    decayed = [p for p in parameters if p.dim() > 1 and id(p) not in embeddings]
    kept = [p for p in parameters if p.dim() < 2 or id(p) in embeddings]
    return [{"params": decayed, "weight_decay": decay}, {"params": kept, "weight_decay": kept_decay}]


# --- the optimizer ----------------------------------------------------------------------------------------------------


def make_optimizer(args, model: torch.nn.Module, params=None) -> torch.optim.Optimizer | MuonWithAdamW:
    """The optimizer of --optimizer over `params`, or over all that `model` trains, in the groups of --param_groups.

    AdamW is fused into one kernel on CPU and CUDA. `initial_lr` keeps each group's peak for the schedule.

    Raises:
        ValueError: Muon asked of a torch that has none; --param_groups that are malformed, without effect, or given to
            a stage that brings its own `params`.
    """
    patterns = parse_groups(args.param_groups)
    if params is not None and patterns:
        raise ValueError(f"--param_groups {args.param_groups[0]!r}: this stage has parameter groups of its own")
    groups = list(params) if params is not None else None
    if groups is None:
        groups = parameter_groups(model, args.weight_decay, patterns, args.learning_rate)
    elif not isinstance(groups[0], dict):
        groups = [{"params": groups, "weight_decay": args.weight_decay}]
    if args.optimizer == "muon":
        optimizer = _muon(args, model, groups)
    else:
        optimizer = _adamw(args, groups)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _adamw(args, groups) -> torch.optim.AdamW:
    fused = True if torch.device(args.device).type in ("cpu", "cuda") else None
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=fused)


def _muon(args, model: torch.nn.Module, groups) -> MuonWithAdamW:
    """Muon takes the weights of linear layers; embeddings, the output layer tied to them and routers are AdamW's."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"--optimizer muon needs torch 2.9 or later, this is {torch.__version__}: upgrade torch, or pass adamw"
        )
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    linear -= {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    linear -= {id(p) for name, p in model.named_parameters() if name.endswith("lm_head.weight")}
    chosen = [group | {"params": [p for p in group["params"] if id(p) in linear]} for group in groups]
    others = [group | {"params": [p for p in group["params"] if id(p) not in linear]} for group in groups]
    chosen, others = ([group for group in part if group["params"]] for part in (chosen, others))
    if not chosen:
        raise ValueError("--optimizer muon is for linear layers, and none is trained here: pass --optimizer adamw")
    muon = torch.optim.Muon(chosen, lr=args.learning_rate, adjust_lr_fn="match_rms_adamw")
    return MuonWithAdamW(muon, _adamw(args, others) if others else None)
