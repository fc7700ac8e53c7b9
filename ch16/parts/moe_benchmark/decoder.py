"""One decoder layer of a preset on random weights, and the head: what a whole model repeats, measured once.

    x += attention(norm(x)) over a KV cache;  x += experts(norm(x));  at the end: norm, logits, a sampled token

Rotary embeddings are left out: they touch a few kilobytes per token.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ch16.parts.moe_benchmark.experts import Dispatch, Experts, Routing, route
from ch16.parts.moe_benchmark.presets import Preset
from common.timing import graphed, measure


class DecoderLayer:
    """Attention and router of one layer, in the dtype of the given experts.

    Args:
        preset: a whole model's sizes.
        experts: of this layer, or one rank's share of them.
        dispatch: how experts are computed.
    """

    def __init__(self, preset: Preset, experts: Experts, dispatch: Dispatch) -> None:
        self.preset, self.experts, self.dispatch = preset, experts, dispatch
        device, dtype = experts.w_in.device, experts.w_in.dtype

        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device=device, dtype=dtype) * columns**-0.5

        p = preset
        self.qkv = weight((p.heads + 2 * p.kv_heads) * p.head_dim, p.hidden)
        self.out = weight(p.hidden, p.heads * p.head_dim)
        self.router = weight(p.experts, p.hidden)

    def cache(self, sequences: int, context: int) -> torch.Tensor:
        """Keys and values of `context` tokens of each sequence: [2, sequences, kv_heads, context, head_dim]."""
        p = self.preset
        shape = (2, sequences, p.kv_heads, context, p.head_dim)
        return torch.randn(shape, device=self.qkv.device, dtype=self.qkv.dtype)

    def prefill_attention(self, x: torch.Tensor) -> torch.Tensor:
        """Whole prompts x [B, S, H] to the same shape."""
        q, k, v = self._heads(x)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return x + mixed.transpose(1, 2).flatten(2) @ self.out.t()

    def decode_attention(self, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """One token per sequence, x [B, H], which takes the last place of a full cache: to the same shape."""
        p = self.preset
        q, k, v = self._heads(x[:, None])
        cache[0, :, :, -1], cache[1, :, :, -1] = k[:, 0], v[:, 0]
        # Query heads that share a key head become rows of one product: keys are read once for all of them.
        q = q.view(len(x), p.kv_heads, p.heads // p.kv_heads, p.head_dim)
        mixed = F.scaled_dot_product_attention(q, cache[0], cache[1])
        return x + mixed.reshape(len(x), -1) @ self.out.t()

    def choose(self, x: torch.Tensor) -> Routing:
        """Router and top-k for tokens x [T, H]."""
        return route(_norm(x) @ self.router.t(), self.preset.top_k)

    def apply_experts(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Experts on tokens x [T, H], with the residual: to the same shape."""
        return x + self.dispatch(_norm(x), self.experts, routing)

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys, values [B, S, heads, head_dim], the first two normalised (as in Qwen3 and OLMoE)."""
        p = self.preset
        heads = (_norm(x) @ self.qkv.t()).unflatten(-1, (-1, p.head_dim))
        q, k, v = heads.split([p.heads, p.kv_heads, p.kv_heads], dim=2)
        return _norm(q), _norm(k), v


def _norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:])


def sample(x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """Last hidden states x [B, H] to one random token each [B]: logits, softmax, and the Gumbel-max trick."""
    probabilities = (_norm(x) @ embedding.t()).float().softmax(dim=-1)
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)


def seconds_of(work: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of `work()`; on a GPU as a CUDA graph, as engines run it."""
    with torch.no_grad():
        return measure(graphed(work) if device == "cuda" else work, device, repeats=repeats).median
