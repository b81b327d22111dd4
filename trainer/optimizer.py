"""The optimizers of --optimizer: AdamW, or Muon for the matrices of linear layers with AdamW for everything else.

    optimizer = make_optimizer(args, model)

Muon is torch's own (https://kellerjordan.github.io/posts/muon/), its steps scaled to AdamW's size
(https://arxiv.org/abs/2502.16982, section 2.2), so that --learning_rate and --weight_decay mean the same for both.
"""

from __future__ import annotations

import torch


class MuonWithAdamW:
    """Muon and AdamW behind the methods of one optimizer; param_groups holds the groups of both."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer):
        self.parts = {"muon": muon, "adamw": adamw}
        self.found_inf = None  # scalar, 1 where a gradient is not finite; set instead of waited for

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        before = []
        if self.found_inf is not None:  # AdamW's kernel leaves weights and moments alone; Muon's are put back
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


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for AdamW: matrices are decayed; norms, biases and embeddings are not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1 and id(p) not in embeddings]
    kept = [p for p in trained if p.dim() < 2 or id(p) in embeddings]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def make_optimizer(args, model: torch.nn.Module, params=None) -> torch.optim.Optimizer | MuonWithAdamW:
    """The optimizer of --optimizer over `params`, or over all that `model` trains.

    AdamW is fused into one kernel on CPU and CUDA. `initial_lr` keeps each group's peak for the schedule.

    Raises:
        ValueError: Muon asked of a torch that has none.
    """
    groups = list(params) if params is not None else parameter_groups(model, args.weight_decay)
    if not isinstance(groups[0], dict):
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
    return MuonWithAdamW(muon, _adamw(args, others)) if others else muon
