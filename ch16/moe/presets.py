"""Published mixture-of-experts models as sizes: what a layer and a whole model weigh, compute and keep."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import psutil
import torch

from ch16.moe.experts import ExpertSizes
from common.cli import CannotRun
from common.gpu import Machine
from common.models import SHAPES


@dataclass(frozen=True)
class Preset:
    """A mixture-of-experts decoder, or (`layers` 0) only a layer of its routed experts."""

    name: str
    hidden: int
    intermediate: int  # of one expert
    experts: int
    top_k: int
    gated: bool = True
    layers: int = 0  # all alike: grouped-query attention, router, experts
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    vocab: int = 0

    @property
    def sizes(self) -> ExpertSizes:
        """One layer's experts."""
        return ExpertSizes(self.hidden, self.intermediate, self.experts, self.gated)

    @property
    def expert_parameters(self) -> int:
        """Of all experts of the model."""
        return self.layers * self.experts * self.sizes.parameters

    @property
    def other_parameters(self) -> int:
        """Of everything but the experts: attention, routers, embedding and head; norms are too small to count."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + self.hidden * self.experts) + 2 * self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.expert_parameters + self.other_parameters

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers in bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


def from_config(name: str, config: Mapping[str, object]) -> Preset:
    """A preset from the content of a model's config.json.

    The whole model is known where all layers are alike; of models with dense layers, experts shared by all tokens or
    latent attention, only the layer of routed experts is.

    Raises:
        CannotRun: the model is no mixture of experts.
    """
    counts = (config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    experts, top_k = next(filter(None, counts), 0), config.get("num_experts_per_tok")
    if not experts or not top_k:
        raise CannotRun(f"{name} is no mixture of experts: its config.json names no experts")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    layer = Preset(name, hidden, config.get("moe_intermediate_size") or config["intermediate_size"], experts, top_k)
    if any(config.get(key) for key in ("first_k_dense_replace", "n_shared_experts", "kv_lora_rank", "mlp_only_layers")):
        return layer
    return replace(
        layer,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocab=config["vocab_size"],
    )


def require_memory(preset: Preset, tokens: int, machine: Machine, copies: float = 1.0) -> None:
    """Raise CannotRun before anything is allocated if a layer's weights and its rows cannot be held.

    Args:
        copies: of the weights in bfloat16: an FP8 copy counts half.
    """
    weights = copies * 2 * preset.experts * preset.sizes.parameters
    rows = 2 * tokens * preset.top_k * (2 * preset.hidden + preset.sizes.rows_in + preset.intermediate)
    if machine.device == "cpu":
        free = psutil.virtual_memory().available
    else:
        torch.cuda.empty_cache()  # what earlier layers left behind is free, too
        free = torch.cuda.mem_get_info()[0]
    if weights + rows > 0.95 * free:
        raise CannotRun(
            f"{preset.name} needs {weights / 2**30:.1f} GiB for its weights and {rows / 2**30:.1f} GiB for rows, and "
            f"{free / 2**30:.1f} GiB are free; choose another --preset, a smaller --hidden-size or fewer --tokens"
        )


# Layers of routed experts, from the config.json of the named hub repository; whole models are in common/models.py.
_LAYERS_ONLY = {
    # deepseek-ai/DeepSeek-V3
    "deepseek-v3": {
        "hidden_size": 7168, "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "num_attention_heads": 128,
    },
    # zai-org/GLM-4.5-Air
    "glm-4.5-air": {
        "hidden_size": 4096, "moe_intermediate_size": 1408, "n_routed_experts": 128, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "num_attention_heads": 96,
    },
}  # fmt: skip

PRESETS: dict[str, Preset] = {
    name: from_config(name, config)
    for name, config in (SHAPES | _LAYERS_ONLY).items()
    if "num_experts_per_tok" in config
}
