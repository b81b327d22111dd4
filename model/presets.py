"""Named model sizes, so that `--preset small` stands for six numbers.

Parameter counts are those of a vocabulary of 6400 with tied embeddings; tests/test_model.py holds them.
"""

from __future__ import annotations

# what sets MiniMind's third generation apart from the second, beside its widths
V3 = {"qk_norm": True, "rms_norm_eps": 1e-6, "num_key_value_heads": 4}
V3_MOE = {
    "use_moe": True,
    "n_routed_experts": 4,
    "num_experts_per_tok": 1,
    "n_shared_experts": 0,
    "norm_topk_prob": True,
    "aux_loss_alpha": 5e-4,
    "seq_aux": False,
}

# a dense preset says so, lest it take the weights of a mixture of the same width
DENSE = {"use_moe": False}

PRESETS: dict[str, dict] = {
    # 4.6 M: learns to chat and to write small functions in minutes on a laptop's CPU
    "tiny": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, **DENSE},
    # 25.8 M: MiniMind2-Small, the default
    "small": {"hidden_size": 512, "num_hidden_layers": 8, **DENSE},
    # 104.0 M: MiniMind2
    "base": {"hidden_size": 768, "num_hidden_layers": 16, **DENSE},
    # 145.0 M, 91.9 M of them active: MiniMind2-MoE
    "moe": {"hidden_size": 640, "num_hidden_layers": 8, "use_moe": True},
    # 63.9 M: minimind-3
    "minimind3": {"hidden_size": 768, "num_hidden_layers": 8, "intermediate_size": 2432, **V3, **DENSE},
    # 198.4 M, 63.9 M of them active: minimind-3-moe
    "minimind3_moe": {"hidden_size": 768, "num_hidden_layers": 8, "intermediate_size": 2432, **V3, **V3_MOE},
}
