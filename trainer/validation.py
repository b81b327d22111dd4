"""The loss on held-back rows: over all their tokens and all processes, and per byte of their text.

Perplexity depends on the tokenizer, bits per byte do not: they compare models with different vocabularies.
"""

from __future__ import annotations

import json
import math

import torch

from trainer.trainer_utils import add_up


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


class LossSum:
    """The summed loss, its number of tokens and their bytes over the batches of a validation, on all processes.

    Set is_filler where a batch holds rows that another process counts. No GPU waits before the end.
    """

    def __init__(self, tokenizer=None):
        self.bytes_of = token_bytes(tokenizer) if tokenizer is not None else None
        self.is_filler, self.bytes = False, 0
        self.parts: list[torch.Tensor] = []

    def add(self, loss_sum: torch.Tensor, tokens: torch.Tensor, aux_loss: torch.Tensor | None = None) -> None:
        """Count a batch: scalars, as the stage's loss gives them."""
        if not self.is_filler:
            self.parts.append(torch.stack([loss_sum.float(), tokens.float()]))

    def count_bytes(self, batch: dict[str, torch.Tensor]) -> None:
        """Count the bytes of the text that the labels of a batch stand for, if it has some; on the CPU."""
        labels = batch.get("labels")
        if self.bytes_of is not None and labels is not None and not self.is_filler:
            self.bytes += int(self.bytes_of[labels[labels >= 0]].sum())

    def mean(self) -> tuple[float, float | None]:
        """(loss in nats per token, bits per byte or None where bytes are not known)."""
        sums = torch.zeros(3, dtype=torch.float64)
        if self.parts:
            sums[:2] = torch.stack(self.parts).cpu().double().sum(dim=0)
        sums[2] = self.bytes
        add_up(sums)
        loss, tokens, count = sums.tolist()
        return loss / max(tokens, 1), loss / math.log(2) / count if count else None


def token_bytes(tokenizer) -> torch.Tensor | None:
    """Bytes of text that each token stands for, int64 [V]: 0 for control tokens; None for a tokenizer not of bytes."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if "ByteLevel" not in json.dumps(backend["decoder"]):
        return None
    added = tokenizer.added_tokens_decoder
    # in a byte-level vocabulary every character of a token's name is a byte
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    sizes = [len(name) if i not in added else len(added[i].content.encode()) for i, name in enumerate(names)]
    return torch.tensor([0 if i in added and added[i].special else size for i, size in enumerate(sizes)])
