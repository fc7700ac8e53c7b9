import pytest
import torch

from ch16.parts.moe_benchmark.baseline import vllm_dispatch
from ch16.parts.moe_benchmark.experts import Experts, ExpertSizes
from ch16.parts.moe_benchmark.reference import TOLERANCE, reference
from ch16.parts.moe_benchmark.routing import make_routing
from common.gpu import versions

CPU_BUILD = pytest.mark.skipif("vllm" in versions(), reason="the installed vLLM is built for GPUs")


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
