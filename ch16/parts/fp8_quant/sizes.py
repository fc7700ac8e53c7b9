"""How much `fp8_quant.py` measures, in one place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """How much is measured. The defaults fill a GPU; their width is that of the chapter's model, deepseek-coder-33b."""

    hidden: int = 7168
    heads: int = 56
    kv_heads: int = 8
    layers: int = 8
    prefill: int = 16384  # tokens, in sequences of `sequence`
    sequence: int = 512
    gemm_tokens: tuple[int, ...] = (16, 64, 256, 1024, 2048, 8192, 16384)
    decode: tuple[int, ...] = (1, 32, 64, 128)  # sequences at once
    context: int = 512  # tokens in the KV cache of each
    window: int = 1024  # tokens of text read at a time
    batch: int = 16  # windows at a time
    eval_tokens: int = 100_000
    trial_tokens: int = 100_000  # for all recipes; the best one then reads eval_tokens
    repeats: int = 10

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a block's linear layers, under the chapter's names."""
        h, qkv = self.hidden, (self.heads + 2 * self.kv_heads) * self.head_dim
        return {"qkv_proj": (h, qkv), "out_proj": (h, h), "mlp_fc1": (h, 4 * h), "mlp_fc2": (4 * h, h)}

    @property
    def bf16_weight_bytes(self) -> int:
        """Bytes of the stack's linear layers in BF16."""
        return 2 * self.layers * sum(k * n for k, n in self.layer_shapes.values())
