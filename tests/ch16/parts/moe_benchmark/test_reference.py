"""The definition against the chapter's own modules, and Llama's; vLLM's kernel against the definition."""

import pytest
import torch
import torch.nn as nn

from ch16.parts.moe_benchmark.experts import Experts, ExpertSizes, Routing
from ch16.parts.moe_benchmark.reference import TOLERANCE, reference, vllm_dispatch
from ch16.parts.moe_benchmark.routing import make_routing
from common.gpu import versions

CPU_BUILD = pytest.mark.skipif("vllm" in versions(), reason="the installed vLLM is built for GPUs")


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


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


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=CPU_BUILD), pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_vllms_kernel_computes_the_same_layer(device):
    experts = Experts.random(ExpertSizes(256, 128, 8, gated=True), device)
    dispatch, why = vllm_dispatch(experts)
    assert dispatch is not None, why
    x = torch.randn(10, 256, device=device, dtype=torch.bfloat16)
    routing = make_routing("uniform", 10, 8, 2, device=device)
    expected = reference(x, experts, routing)
    assert (dispatch(x, experts, routing).double() - expected).norm() / expected.norm() < TOLERANCE


def test_no_ungated_experts_on_a_cpu():
    dispatch, why = vllm_dispatch(Experts.random(ExpertSizes(64, 32, 2, gated=False)))
    assert dispatch is None and "gated experts only" in why


@pytest.mark.parametrize(("hidden", "intermediate"), [(96, 48), (32, 16), (100, 64)])
def test_widths_that_vllms_cpu_kernel_cannot_compute(hidden, intermediate):
    dispatch, why = vllm_dispatch(Experts.random(ExpertSizes(hidden, intermediate, 2, gated=True)))
    assert dispatch is None and "multiples of 32" in why


@CPU_BUILD
@torch.no_grad()
def test_a_part_of_the_experts_is_computed_with_its_own_weights():
    experts = Experts.random(ExpertSizes(64, 32, 8, gated=True))
    dispatch, why = vllm_dispatch(experts)
    assert dispatch is not None, why
    x, routing, part = torch.randn(10, 64, dtype=torch.bfloat16), make_routing("uniform", 10, 2, 1), experts.part(4, 2)
    expected = reference(x, part, routing)
    assert (dispatch(x, part, routing).double() - expected).norm() / expected.norm() < TOLERANCE


@pytest.mark.gpu
@torch.no_grad()
def test_ungated_experts_on_a_gpu():
    experts = Experts.random(ExpertSizes(256, 512, 8, gated=False), "cuda")
    dispatch, why = vllm_dispatch(experts)
    assert dispatch is not None, why
    x = torch.randn(10, 256, device="cuda", dtype=torch.bfloat16)
    routing = make_routing("uniform", 10, 8, 2, device="cuda")
    expected = reference(x, experts, routing)
    assert (dispatch(x, experts, routing).double() - expected).norm() / expected.norm() < TOLERANCE
