"""The Triton kernels against the definition and against the CPU's sort."""

import pytest
import torch

from ch16.moe_benchmark import DISPATCH, grouped
from ch16.parts.moe_benchmark import plain
from ch16.parts.moe_benchmark.experts import Experts, ExpertSizes, Routing
from ch16.parts.moe_benchmark.reference import TOLERANCE, TOLERANCE_FP8, reference
from ch16.parts.moe_benchmark.routing import make_routing

pytestmark = pytest.mark.gpu

SHAPES = [  # hidden, intermediate, experts, top-k, tokens, gated
    (256, 128, 8, 2, 5, True),
    (256, 128, 64, 8, 300, True),
    (208, 96, 7, 3, 50, False),  # no multiple of a tile
    (4096, 2048, 64, 8, 64, True),
    (512, 2048, 64, 2, 9000, False),
    (512, 256, 4, 2, 9000, True),  # many rows: PyTorch's grouped GEMM
    (7168, 256, 256, 8, 40, True),
    (256, 128, 1, 1, 1000, True),
    (256, 128, 1, 1, 50, True),
    (104, 24, 4, 2, 900, False),  # rows that PyTorch's grouped GEMM cannot take
    (256, 128, 300, 8, 33, False),  # more experts than a power of two below
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", ["uniform", "zipf", "hot"])
@pytest.mark.parametrize("name", ["loop", "grouped", "fp8"])
@torch.no_grad()
def test_every_dispatch_agrees_with_float64(shape, pattern, name):
    hidden, intermediate, count, top_k, tokens, gated = shape
    torch.manual_seed(tokens)
    experts = Experts.random(ExpertSizes(hidden, intermediate, count, gated), "cuda")
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    routing = make_routing(pattern, tokens, count, top_k, seed=tokens, device="cuda")
    some = torch.linspace(0, tokens - 1, min(tokens, 12), device="cuda").long()
    expected = reference(x[some], experts, Routing(routing.experts[some], routing.weights[some]))
    found = DISPATCH[name](x, experts, routing)[some].double()
    assert (found - expected).norm() / expected.norm() < (TOLERANCE_FP8 if name == "fp8" else TOLERANCE)


@pytest.mark.parametrize("tokens", [1, 31, 64, 5000, 40_000])
@pytest.mark.parametrize("count", [1, 3, 64, 256, 384])
def test_sort_is_the_cpus(tokens, count):
    from ch16.parts.moe_benchmark import kernels

    routing = make_routing("zipf", tokens, count, min(count, 4), seed=tokens)
    places, ends = kernels.sort_rows(routing.experts.cuda(), count)
    expected_places, expected_ends = plain.sort_rows(routing.experts, count)
    assert torch.equal(places.cpu().long(), expected_places) and torch.equal(ends.cpu().long(), expected_ends)


@torch.no_grad()
def test_experts_nobody_chose_are_not_read():
    experts = Experts.random(ExpertSizes(256, 128, 16, gated=True), "cuda")
    x = torch.randn(20, 256, device="cuda", dtype=torch.bfloat16)
    routing = make_routing("uniform", 20, 8, 2, device="cuda")  # experts 8 to 15 get nothing
    before = grouped(x, experts, routing)
    experts.w_in[8:], experts.w_out[8:] = float("nan"), float("nan")
    assert torch.equal(grouped(x, experts, routing), before)


@torch.no_grad()
def test_views_no_tokens_and_other_types():
    experts = Experts.random(ExpertSizes(256, 128, 8, gated=True), "cuda")
    wide = torch.randn(20, 512, device="cuda", dtype=torch.bfloat16)
    routing = make_routing("uniform", 20, 8, 2, 0, "cuda")
    view, weights = wide[:, :256], routing.weights.repeat_interleave(2, dim=1)[:, ::2]
    expected = grouped(view.contiguous(), experts, routing)
    assert torch.equal(grouped(view, experts, Routing(routing.experts, weights)), expected)
    nobody = Routing(routing.experts[:0], routing.weights[:0])
    assert grouped(view[:0], experts, nobody).shape == (0, 256)
    with pytest.raises(ValueError, match="compute bfloat16"):
        grouped(view.float(), experts, routing)
    with pytest.raises(ValueError, match="compute bfloat16"):
        grouped(view, experts.float(), routing)


@pytest.mark.parametrize(("tokens", "name"), [(100, "grouped"), (100, "fp8"), (9000, "grouped"), (9000, "fp8")])
@torch.no_grad()
def test_nothing_waits_for_the_host(tokens, name):
    """A CUDA graph can be captured, and replays on new input."""
    from common.timing import graphed

    experts = Experts.random(ExpertSizes(256, 128, 16, gated=True), "cuda")
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    routing = make_routing("uniform", tokens, 16, 2, device="cuda")
    out = torch.empty_like(x)
    replay = graphed(lambda: out.copy_(DISPATCH[name](x, experts, routing)))
    x.normal_()
    routing.experts.copy_(make_routing("zipf", tokens, 16, 2, device="cuda").experts)
    replay()
    assert torch.equal(out, DISPATCH[name](x, experts, routing))
