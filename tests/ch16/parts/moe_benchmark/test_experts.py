"""Dispatch paths against the definition, and the definition against the chapter's own modules."""

import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.moe_benchmark.experts import (
    TOLERANCE,
    Experts,
    ExpertSizes,
    Routing,
    check_input,
    grouped,
    loop,
    reference,
    route,
    sort_rows,
)
from ch16.parts.moe_benchmark.routing import PATTERNS, make_routing
from common.cli import CannotRun


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@st.composite
def cases(draw):
    experts = draw(st.integers(1, 12))
    top_k = draw(st.integers(1, experts))
    tokens = draw(st.integers(1, 40))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    sizes = ExpertSizes(draw(st.sampled_from([8, 24])), draw(st.sampled_from([4, 16])), experts, draw(st.booleans()))
    x = torch.randn(tokens, sizes.hidden, dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])))
    routing = make_routing(draw(st.sampled_from(PATTERNS)), tokens, experts, top_k, seed=tokens)
    return x, Experts.random(sizes, dtype=x.dtype), routing


@given(cases(), st.sampled_from([loop, grouped]))
def test_every_path_is_the_weighted_sum_of_exactly_the_chosen_experts(case, path):
    x, experts, routing = case
    limit = TOLERANCE if x.dtype == torch.bfloat16 else 1e-5
    assert error(path(x, experts, routing), reference(x, experts, routing)) < limit


@given(cases(), st.sampled_from([loop, grouped]), st.randoms())
def test_permuting_tokens_permutes_outputs(case, path, random):
    x, experts, routing = case
    order = list(range(len(x)))
    random.shuffle(order)
    shuffled = path(x[order], experts, Routing(routing.experts[order], routing.weights[order]))
    assert torch.allclose(shuffled.float(), path(x, experts, routing)[order].float(), rtol=0.05, atol=1e-2)


@given(cases())
def test_experts_nobody_chose_do_not_matter(case):
    """Their weights may be anything, even NaN."""
    x, experts, routing = case
    unused = torch.ones(experts.sizes.experts, dtype=torch.bool)
    unused[routing.experts.flatten()] = False
    before = grouped(x, experts, routing)
    experts.w_in[unused], experts.w_out[unused] = float("nan"), float("nan")
    assert torch.equal(grouped(x, experts, routing), before)
    assert torch.isfinite(loop(x, experts, routing)).all()


def chapter_experts(experts):
    """The same weights as the chapter's modules, nn.Sequential(Linear, GELU, Linear), in float64."""
    modules = []
    for w_in, w_out in zip(experts.w_in, experts.w_out, strict=True):
        first = nn.Linear(*reversed(w_in.shape), bias=False, dtype=torch.float64)
        second = nn.Linear(*reversed(w_out.shape), bias=False, dtype=torch.float64)
        first.weight.data, second.weight.data = w_in.double(), w_out.double()
        modules.append(nn.Sequential(first, nn.GELU(), second))
    return modules


def test_the_definition_is_the_chapters_layer():
    torch.manual_seed(0)
    experts = Experts.random(ExpertSizes(16, 64, 5, gated=False), dtype=torch.float32)
    x, routing = torch.randn(9, 16), make_routing("uniform", 9, 5, 3)
    modules, expected = chapter_experts(experts), torch.zeros(9, 16, dtype=torch.float64)
    for t in range(9):
        for j in range(3):
            chosen = modules[routing.experts[t, j]]
            expected[t] += routing.weights[t, j].double() * chosen(x[t].double()).detach()
    assert error(reference(x, experts, routing), expected) < 1e-12


def test_gated_experts_are_llamas():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    experts = Experts.random(ExpertSizes(16, 32, 1, gated=True), dtype=torch.float32)
    mlp = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=4))
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = experts.w_in[0].chunk(2)
    mlp.down_proj.weight.data = experts.w_out[0]
    x = torch.randn(4, 16)
    one = Routing(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
    assert error(reference(x, experts, one), mlp(x).detach()) < 1e-6


@given(st.integers(1, 30), st.integers(1, 9), st.data())
def test_combine_weights_sum_to_one_and_choices_differ(tokens, experts, data):
    top_k = data.draw(st.integers(1, experts))
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    routing = route(logits, top_k)
    assert torch.allclose(routing.weights.sum(1), torch.ones(tokens))
    assert all(len(set(row)) == top_k for row in routing.experts.tolist())
    whole = logits.softmax(1).gather(1, routing.experts)  # over all experts, then scaled to 1
    assert torch.allclose(routing.weights, whole / whole.sum(1, keepdim=True), atol=1e-6)


@given(st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=30))
def test_rows_are_sorted_by_expert_and_stay_in_order(chosen):
    experts = torch.tensor(chosen)
    places, ends = sort_rows(experts, 7)
    flat, order = experts.flatten().tolist(), places.flatten().tolist()
    expected = sorted(range(len(flat)), key=lambda row: (flat[row], row))
    assert [order.index(place) for place in range(len(flat))] == expected
    assert ends.tolist() == [sum(e <= expert for e in flat) for expert in range(7)]


def test_a_part_shares_memory():
    experts = Experts.random(ExpertSizes(8, 8, 6, gated=True))
    part = experts.part(2, 3)
    assert part.sizes.experts == 3 and part.w_in.data_ptr() == experts.w_in[2].data_ptr()


def test_fp8_weights_have_a_scale_each_row():
    experts = Experts.random(ExpertSizes(64, 32, 3, gated=True))
    w_in, w_out = experts.fp8()
    assert w_in.values.shape == (3, 64, 64) and w_in.scales.shape == (3, 64) and w_out.scales.shape == (3, 64)
    back = w_in.values.float() * w_in.scales[..., None]
    assert error(back, experts.w_in) < 0.04
    assert experts.fp8()[0] is w_in


def test_counts():
    sizes = ExpertSizes(4096, 2048, 64, gated=True)
    assert sizes.parameters == 3 * 4096 * 2048 and sizes.flops(10) == 20 * sizes.parameters
    assert ExpertSizes(4096, 16384, 8, gated=False).parameters == 2 * 4096 * 16384


@pytest.mark.parametrize(("tokens", "top_k", "message"), [(0, 2, "zero tokens"), (3, 5, "5 experts per token")])
def test_what_no_path_can_compute(tokens, top_k, message):
    x, routing = torch.randn(tokens, 8), Routing(torch.zeros(tokens, top_k).long(), torch.ones(tokens, top_k))
    with pytest.raises(CannotRun, match=message):
        check_input(x, routing, ExpertSizes(8, 8, 4, gated=False))
