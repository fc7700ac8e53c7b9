"""How many bytes a token takes in the KV cache, from a model's config.json.

    multi-head, grouped-query   2 (K, V) x layers x kv_heads x head_dim x bytes of a value
    latent attention (MLA)      layers x (kv_lora_rank + qk_rope_head_dim) x bytes: one vector for all heads
    sliding window              a layer keeps only the last `window` tokens

Sources: Ainslie et al., arXiv 2305.13245 (GQA); DeepSeek-V2, arXiv 2405.04434 (MLA); Mistral 7B, arXiv 2310.06825.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from common.cli import CannotRun
from common.models import kv_bytes_per_token

BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}


@dataclass(frozen=True)
class KVShape:
    """Bytes per token: in layers that keep everything, and in layers with a sliding window."""

    full_bytes: int
    window_bytes: int = 0
    window: int = 0  # tokens

    @property
    def bytes_per_token(self) -> int:
        """As long as the context is shorter than the window."""
        return self.full_bytes + self.window_bytes

    def sequence_bytes(self, tokens: int) -> int:
        """Of a whole sequence."""
        return tokens * self.full_bytes + min(tokens, self.window or tokens) * self.window_bytes


def kv_shape(config: Mapping[str, object], cache_dtype: str = "auto") -> KVShape:
    """KV bytes of a model by its config.json; vLLM's `kv_cache_dtype` "auto" is bfloat16.

    Raises:
        CannotRun: the config lacks a size, or the type is unknown.
    """
    if cache_dtype not in BYTES:
        raise CannotRun(f"unknown KV cache type '{cache_dtype}'; known are {', '.join(BYTES)}")
    try:
        layers, size = int(config["num_hidden_layers"]), BYTES[cache_dtype]
        if config.get("kv_lora_rank"):
            return KVShape(layers * (config["kv_lora_rank"] + config["qk_rope_head_dim"]) * size)
        each = kv_bytes_per_token(config, size) // layers
    except KeyError as error:
        raise CannotRun(f"this model's config.json has no {error}") from None
    window = config.get("sliding_window") or 0
    if not window or config.get("use_sliding_window") is False:
        return KVShape(layers * each)
    kinds = config.get("layer_types")
    if kinds is None and (config.get("max_window_layers") or config.get("sliding_window_pattern")):
        raise CannotRun("this model's config.json does not list which layers have a sliding window (layer_types)")
    kinds = kinds or ["sliding_attention"] * layers
    sliding = sum(kind == "sliding_attention" for kind in kinds)
    return KVShape((layers - sliding) * each, sliding * each, window if sliding else 0)
