import math
from dataclasses import replace

import pytest
import torch

from ch16.moe_benchmark import grouped
from ch16.parts.moe_benchmark.capacity import Capacity, DecoderLayer, sample
from ch16.parts.moe_benchmark.experts import Experts
from ch16.parts.moe_benchmark.planner import Link, Workload
from ch16.parts.moe_benchmark.presets import Preset
from ch16.parts.moe_benchmark.sizes import sizes_for
from common.gpu import detect

MACHINE = replace(detect("cpu"), native_bf16=True)

SMALL = Preset("small", 64, 32, 8, 2, layers=3, heads=4, kv_heads=2, head_dim=16, vocab=100)
LAYER = Preset("small", 32, 16, 4, 2, layers=1, heads=4, kv_heads=2, head_dim=8, vocab=50)
WORK = Workload(sequences=4, tokens_in=8, tokens_out=5, chunk=64)
SIZES = replace(sizes_for(MACHINE, quick=True), workload=WORK, repeats=2)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_plans_row_is_made_of_its_parts(ranks):
    capacity = Capacity(SMALL, grouped, MACHINE, Link(1e9, "test"), SIZES, seed=0)
    row = capacity.plan_row(ranks)
    assert row["gpus"] == ranks and row["fits"] == "yes"
    assert row["decode_step_ms"] == pytest.approx(3 * (row["layer_ms"] + row["exchange_ms"]) + row["head_ms"])
    rows = 4 / ranks * 2  # of one rank: sequences x experts per token
    assert row["exchange_ms"] == pytest.approx(1e3 * 2 * rows * 64 * 2 * (ranks - 1) / ranks / 1e9)
    assert row["weights_gb"] == pytest.approx(2 * (SMALL.expert_parameters / ranks + SMALL.other_parameters) / 1e9)


def test_other_ranks_are_computed_with_a_share_of_the_experts(monkeypatch):
    capacity, seen = Capacity(SMALL, grouped, MACHINE, Link(1e9, "test"), SIZES, seed=0), []
    dispatch = capacity.dispatch
    capacity.dispatch = lambda x, experts, routing: (
        seen.append((len(x), experts.sizes.experts)),
        dispatch(x, experts, routing),
    )[1]
    torch.manual_seed(0)
    capacity.parts(4, "decode")
    assert {experts for _, experts in seen} == {2}
    assert all(1 <= rows <= 4 * 2 for rows, _ in seen)  # at least the mean, at most all rows


def layer():
    torch.manual_seed(0)
    return DecoderLayer(LAYER, Experts.random(LAYER.sizes, dtype=torch.float32), grouped)


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
