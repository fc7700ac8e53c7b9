"""The definition against the chapter's own modules, and Llama's."""

import torch
import torch.nn as nn

from ch16.parts.moe_benchmark.experts import Experts, ExpertSizes, Routing
from ch16.parts.moe_benchmark.reference import reference
from ch16.parts.moe_benchmark.routing import make_routing


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
