"""Load a trained model for answering, and decode with it.

Decoding is Hugging Face `generate` over our own network; what is here chooses its settings and times it.

    model, tokenizer, info = load_for_inference(weight="full_sft")
    ids = render(tokenizer, [{"role": "user", "content": "你好"}], add_generation_prompt=True).input_ids
    text, tokens, seconds = reply(model, tokenizer, ids, max_new_tokens=100)
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextStreamer

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import find_weights, load_model, read_sidecar


@dataclass
class ModelInfo:
    """Where a model came from: its path, its training stage ("" if unknown), and what its sidecar says."""

    path: Path
    stage: str = ""
    sidecar: dict = field(default_factory=dict)

    @property
    def continues_text(self) -> bool:
        """A model that was only pretrained continues a text; it never saw a conversation."""
        return self.stage == "Pretrain" or (not self.stage and self.path.name.startswith("pretrain"))


def load_for_inference(
    weight: str = "full_sft",
    save_dir: str | Path = "out",
    tokenizer_path: str | Path = "model",
    overrides: dict | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    say=print,
):
    """(model in eval mode, tokenizer, ModelInfo) from native weights; the sizes come from their sidecar.

    Raises:
        FileNotFoundError, ValueError: no such weights; a pair that does not fit together.
    """
    overrides = overrides or {}
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_path), trust_remote_code=False)
    path = find_weights(save_dir, weight, overrides.get("hidden_size"), overrides.get("use_moe"))
    model = load_model(path, overrides, tokenizer, say)
    sidecar = read_sidecar(path) or {}
    return model.to(device, dtype).eval(), tokenizer, ModelInfo(path, sidecar.get("stage", ""), sidecar)


def load_folder(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, remote_code: bool = False):
    """(model, tokenizer, ModelInfo) from a folder in transformers format.

    Folders of this network's own type need no remote code: the classes are known here. Others do as transformers knows
    them; code inside the folder runs only with remote_code=True.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise FileNotFoundError(
            f"{path} is no folder in transformers format (no config.json): pass --load_from model for native weights"
        )
    AutoConfig.register(MiniMindConfig.model_type, MiniMindConfig, exist_ok=True)
    AutoModelForCausalLM.register(MiniMindConfig, MiniMindForCausalLM, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=remote_code)
    model, found = AutoModelForCausalLM.from_pretrained(
        str(path), trust_remote_code=remote_code, torch_dtype=dtype, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, keys))[:4] for kind, keys in found.items() if keys and kind != "error_msgs"}
    if wrong:
        raise ValueError(
            f"the weights of {path} do not fit its config.json, answers would be noise: {wrong}. A folder with a "
            "network of its own needs --trust_remote_code"
        )
    return model.to(device).eval(), tokenizer, ModelInfo(path)


def sampling_options(
    temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, repetition_penalty: float = 1.0
) -> dict:
    """Keyword arguments of `generate`; temperature 0 is greedy: the likeliest token, always the same answer."""
    options = {"do_sample": temperature > 0, "repetition_penalty": repetition_penalty}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    return options


@torch.inference_mode()
def reply(
    model: PreTrainedModel,
    tokenizer,
    input_ids: list[int],
    max_new_tokens: int = 512,
    stream: bool = False,
    skip_special_tokens: bool = True,
    **options,
) -> tuple[str, int, float]:
    """Continue a prompt until its end token: (text, new tokens, seconds).

    Args:
        input_ids: the prompt; options: those of sampling_options. stream: print the text as it comes.
    """
    ids = torch.tensor([input_ids], device=model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=skip_special_tokens) if stream else None
    began = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
        **{**sampling_options(), **options},
    )
    new = output[0, len(input_ids) :].tolist()
    seconds = time.perf_counter() - began
    return tokenizer.decode(new, skip_special_tokens=skip_special_tokens).strip(), len(new), seconds
