import math

import torch

from ch16.moe_benchmark import grouped
from ch16.parts.moe_benchmark.decoder import DecoderLayer, sample
from ch16.parts.moe_benchmark.experts import Experts
from ch16.parts.moe_benchmark.presets import Preset

SMALL = Preset("small", 32, 16, 4, 2, layers=1, heads=4, kv_heads=2, head_dim=8, vocab=50)


def layer():
    torch.manual_seed(0)
    return DecoderLayer(SMALL, Experts.random(SMALL.sizes, dtype=torch.float32), grouped)


def norm(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def attention_by_hand(block, x):
    """One sequence [S, H] in loops: causal softmax attention, two query heads to a key head."""
    out = torch.zeros_like(x)
    heads = (norm(x) @ block.qkv.t()).view(len(x), 8, 8)
    q, k, v = norm(heads[:, :4]), norm(heads[:, 4:6]), heads[:, 6:]
    for s in range(len(x)):
        mixed = []
        for head in range(4):
            scores = torch.stack([q[s, head] @ k[t, head // 2] / math.sqrt(8) for t in range(s + 1)]).softmax(0)
            mixed.append(sum(scores[t] * v[t, head // 2] for t in range(s + 1)))
        out[s] = x[s] + torch.cat(mixed) @ block.out.t()
    return out, k, v


def test_prefill_and_decode_are_the_textbooks():
    block, x = layer(), torch.randn(5, 32)
    expected, k, v = attention_by_hand(block, x)
    assert torch.allclose(block.prefill_attention(x[None])[0], expected, atol=1e-5)
    cache = block.cache(1, 5)
    cache[0, 0, :, :4], cache[1, 0, :, :4] = k[:4].transpose(0, 1), v[:4].transpose(0, 1)
    assert torch.allclose(block.decode_attention(x[4:], cache)[0], expected[4], atol=1e-5)


def test_experts_are_added_to_the_residual():
    block, x = layer(), torch.randn(5, 32)
    routing = block.choose(x)
    assert torch.allclose(block.apply_experts(x, routing), x + grouped(norm(x), block.experts, routing), atol=1e-5)


def test_sampling_follows_the_softmax():
    torch.manual_seed(0)
    x, embedding = torch.randn(1, 32), torch.randn(50, 32) * 0.3
    expected = (norm(x) @ embedding.t()).softmax(-1)[0]
    drawn = torch.bincount(sample(x.expand(20_000, 32), embedding), minlength=50) / 20_000
    assert (drawn - expected).abs().max() < 0.02
