"""Transformer Engine's recipes behind the same interface; on a GPU with FP8 units."""

import pytest
import torch

from ch16.fp8_quant import FP8TransformerBlock, FP8TransformerModel, recipes
from ch16.parts.fp8_quant.blocks import measure_gemm, measure_stack
from ch16.parts.fp8_quant.precision import (
    calibrate,
    held_bytes,
    load_quantized,
    padded_rows,
    transformer_engine,
)
from ch16.parts.fp8_quant.sizes import Fp8Sizes
from common.gpu import detect
from common.timing import graphed

pytestmark = pytest.mark.gpu
RECIPES = ["delayed", "current", "block"]
SMALL = Fp8Sizes(512, 8, 2, 2, prefill=1024, sequence=64, gemm_tokens=(), decode=(4,), context=32, repeats=2)


@pytest.fixture(scope="module")
def te():
    library, reason = transformer_engine("cuda")
    if library is None:
        pytest.skip(f"Transformer Engine: {reason}")
    return library


def linear_pair(te, recipe, n, k, batches):
    precision = recipes(te)[recipe]
    options = {"bias": False, "params_dtype": torch.bfloat16, "device": "cuda"}
    torch.manual_seed(0)
    plain = te.Linear(k, n, **options).requires_grad_(False)
    calibrate(plain, precision, batches)
    with torch.no_grad(), precision.weights():
        small = te.Linear(k, n, **options)
    load_quantized(small, plain, precision)
    return precision, plain, small


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_product_against_float64(te, recipe):
    """Two roundings to E4M3, each at most 2^-4 relative where nothing underflows, and BF16's on the way out."""
    x = torch.randn(64, 256, device="cuda").bfloat16()
    precision, plain, small = linear_pair(te, recipe, 128, 256, [x, x])
    with precision.compute():
        y = small(x).double()
    x64, w64 = x.double(), plain.weight.double()
    u, tiny = 2.0**-4, 2.0**-10 / 224
    x_off, w_off = (u * t.abs() + tiny * t.abs().max() for t in (x64, w64))
    bound = x_off @ w64.abs().t() + x64.abs() @ w_off.t() + x_off @ w_off.t() + 2.0**-6 * x64.abs() @ w64.abs().t()
    assert bool(((y - x64 @ w64.t()).abs() <= bound).all())


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_take_one_byte(te, recipe):
    _, plain, small = linear_pair(te, recipe, 1024, 1024, [torch.randn(16, 1024, device="cuda").bfloat16()] * 2)
    assert held_bytes(small) / held_bytes(plain) == pytest.approx(0.5, abs=0.01)


@torch.no_grad()
def test_delayed_scaling_needs_calibration(te):
    x = torch.randn(64, 256, device="cuda").bfloat16() * 1000
    errors = {}
    for batches in ([], [x, x]):
        precision, plain, small = linear_pair(te, "delayed", 128, 256, batches)
        with precision.compute():
            y = small(x).float()
        errors[len(batches)] = ((y - plain(x).float()).norm() / plain(x).float().norm()).item()
    assert errors[2] < 0.06 < 0.2 < errors[0]


@pytest.mark.parametrize("tokens", [1, 17, 31, 48])
@torch.no_grad()
def test_any_number_of_tokens(te, tokens):
    x = torch.randn(48, 256, device="cuda").bfloat16()
    precision, _, small = linear_pair(te, "delayed", 128, 256, [x, x])
    with precision.compute():
        assert torch.allclose(padded_rows(small, x[:tokens]), padded_rows(small, x)[:tokens], atol=0.02, rtol=0.02)


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_block_agrees_with_its_twin_and_is_causal(te, recipe):
    precision = recipes(te)[recipe]
    torch.manual_seed(0)
    twin = FP8TransformerBlock(256, 4, 2, precision=precision.bf16())
    x = torch.randn(2, 40, 256, device="cuda").bfloat16()
    calibrate(twin, precision, [torch.randn(2, 40, 256, device="cuda").bfloat16()] * 2)
    small = FP8TransformerBlock(256, 4, 2, precision=precision)
    load_quantized(small, twin, precision)
    assert 0 < ((small(x) - twin(x)).float().norm() / twin(x).float().norm()).item() < 0.125
    changed = torch.cat([x[:, :20], torch.randn_like(x[:, 20:])], dim=1)
    for model, tolerance in ((twin, 0.02), (small, 0.02 if recipe != "current" else 0.5)):
        assert torch.allclose(model(x)[:, :20], model(changed)[:, :20], atol=tolerance)


@torch.no_grad()
def test_decode_in_a_graph_is_the_same_step(te):
    precision = recipes(te)["current"]
    model = FP8TransformerModel(SMALL, precision, "cuda")
    source = FP8TransformerModel(SMALL, precision.bf16(), "cuda")
    load_quantized(model, source, precision)
    caches = [torch.randn(2, 4, 2, 32, 64, device="cuda").bfloat16() for _ in range(2)]
    token, out = torch.randn(4, 1, 512, device="cuda").bfloat16(), torch.empty(4, 1, 512, device="cuda").bfloat16()
    replay = graphed(lambda: out.copy_(model(token, caches, 31)))
    token.copy_(torch.randn_like(token))
    expected = model(token, [c.clone() for c in caches], 31)
    replay()
    assert torch.allclose(out, expected, atol=0.01)


@pytest.mark.parametrize("recipe", RECIPES)
def test_stack_and_product_rows(te, recipe):
    precision, machine = recipes(te)[recipe], detect()
    memory, rows = measure_stack(lambda p: FP8TransformerModel(SMALL, p, "cuda"), precision, machine, SMALL, 0)
    assert 0.4 < memory["weight_ratio"] < 0.56 and memory["fp8_peak_mb"] < memory["bf16_peak_mb"]
    assert [row["phase"] for row in rows] == ["prefill", "decode, CUDA graph"]
    assert all(row["fp8_tokens_per_s"] > 0 for row in rows)
    row = measure_gemm("x", 256, 512, 40, [precision], machine, 2)  # 40 tokens: padded to 48
    assert row["tokens"] == 40 and row["limit"] > 0 and row["speedup"] == row[recipe] / row["BF16"]
