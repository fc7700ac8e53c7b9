"""Published mixture-of-experts models by their sizes, and whether a layer fits into memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ch16.parts.moe_benchmark.experts import ExpertSizes
from common.cli import CannotRun
from common.gpu import Machine, free_bytes
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
    def kv_values_per_token(self) -> int:
        """Numbers in the keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim


# Dense layers, experts shared by all tokens, latent attention.
_OTHER_PARTS = (
    "first_k_dense_replace",
    "mlp_only_layers",
    "n_shared_experts",
    "shared_expert_intermediate_size",
    "kv_lora_rank",
)


def from_config(name: str, config: Mapping[str, object]) -> Preset:
    """A preset from a model's config.json: only a layer where layers differ or have parts that are not measured here.

    Raises:
        CannotRun: the model is no mixture of experts, or a size is missing.
    """
    counts = (config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    experts, top_k = next(filter(None, counts), 0), config.get("num_experts_per_tok")
    if not experts or not top_k:
        raise CannotRun(f"{name} is no mixture of experts: its config.json names no experts")
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        layer = Preset(name, hidden, config.get("moe_intermediate_size") or config["intermediate_size"], experts, top_k)
        if any(map(config.get, _OTHER_PARTS)) or config.get("decoder_sparse_step", 1) != 1:
            return layer
        layers, vocab = config["num_hidden_layers"], config["vocab_size"]
        kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
        return replace(layer, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim, vocab=vocab)
    except KeyError as error:
        raise CannotRun(f"{name}: its config.json has no {error}") from None


def require_memory(
    preset: Preset, tokens: int, machine: Machine, copies: float = 1.0, contenders: int = 1, extra: float = 0.0
) -> None:
    """Raise CannotRun before anything is allocated if a layer does not fit into memory.

    Counted are `copies` of its weights (one in FP8 is half a copy), the rows of `tokens` tokens for each of the
    `contenders` that keep theirs at the same time (a CUDA graph does), and `extra` bytes.
    """
    weights = copies * machine.itemsize * preset.experts * preset.sizes.parameters
    rows = tokens * preset.top_k * (2 * preset.hidden + preset.sizes.rows_in + preset.intermediate)
    rows = rows * machine.itemsize * contenders + extra
    free = free_bytes(machine)
    if weights + rows > 0.95 * free:
        raise CannotRun(
            f"{preset.name} needs {weights / 2**30:.1f} GiB for its weights and {rows / 2**30:.1f} GiB for the rest, "
            f"and {free / 2**30:.1f} GiB are free; choose another --preset, a smaller --hidden-size, or fewer --tokens "
            "or --sequences"
        )


def those_that_fit(
    presets: Sequence[Preset], tokens: int, machine: Machine, **needs: float
) -> tuple[list[Preset], list[str]]:
    """The presets that pass `require_memory`, at least one, and its messages about the rest."""
    fitting, left_out = [], []
    for preset in presets:
        try:
            require_memory(preset, tokens, machine, **needs)
            fitting.append(preset)
        except CannotRun as error:
            left_out.append(str(error))
    if not fitting:
        raise CannotRun(left_out[0])
    return fitting, left_out


PRESETS: dict[str, Preset] = {
    name: from_config(name, config) for name, config in SHAPES.items() if "num_experts_per_tok" in config
}
# Layers of routed experts, from the config.json of deepseek-ai/DeepSeek-V3 and zai-org/GLM-4.5-Air.
PRESETS["deepseek-v3"] = Preset("deepseek-v3", hidden=7168, intermediate=2048, experts=256, top_k=8)
PRESETS["glm-4.5-air"] = Preset("glm-4.5-air", hidden=4096, intermediate=1408, experts=128, top_k=8)
