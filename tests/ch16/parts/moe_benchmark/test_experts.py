"""Weights, sizes and routing of experts."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.moe_benchmark.experts import Experts, ExpertSizes, route


@given(st.integers(1, 30), st.integers(1, 9), st.data())
def test_combine_weights_sum_to_one_and_choices_differ(tokens, experts, data):
    top_k = data.draw(st.integers(1, experts))
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    routing = route(logits, top_k)
    assert torch.allclose(routing.weights.sum(1), torch.ones(tokens))
    assert all(len(set(row)) == top_k for row in routing.experts.tolist())
    whole = logits.softmax(1).gather(1, routing.experts)  # over all experts, then scaled to 1
    assert torch.allclose(routing.weights, whole / whole.sum(1, keepdim=True), atol=1e-6)


def test_a_part_shares_memory():
    experts = Experts.random(ExpertSizes(8, 8, 6, gated=True))
    part = experts.part(2, 3)
    assert part.sizes.experts == 3 and part.w_in.data_ptr() == experts.w_in[2].data_ptr()


def test_fp8_weights_have_a_scale_each_row():
    experts = Experts.random(ExpertSizes(64, 32, 3, gated=True))
    w_in, w_out = experts.fp8()
    assert w_in.values.shape == (3, 64, 64) and w_in.scales.shape == (3, 64) and w_out.scales.shape == (3, 64)
    back = w_in.values.float() * w_in.scales[..., None]
    assert (back - experts.w_in.float()).norm() / experts.w_in.float().norm() < 0.04
    assert experts.fp8()[0] is w_in


def test_counts():
    sizes = ExpertSizes(4096, 2048, 64, gated=True)
    assert sizes.parameters == 3 * 4096 * 2048 and sizes.flops(10) == 20 * sizes.parameters
    assert ExpertSizes(4096, 16384, 8, gated=False).parameters == 2 * 4096 * 16384
