"""The PyTorch layers: products against float64, the emulation against torch._scaled_mm, padding, calibration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ch16.parts.fp8_quant import layers
from ch16.parts.fp8_quant.precision import (
    Precision,
    calibrate,
    held_bytes,
    load_quantized,
    padded_rows,
    require_multiples,
)
from common.cli import CannotRun
from common.fp8 import E4M3, WEIGHT_BLOCK, dequantize, quantize

RECIPES = {name: Precision(name, layers, scaling) for name, scaling in layers.RECIPES.items()}
sizes = st.integers(1, 8).map(lambda n: 16 * n)


def pair(recipe, n, k, seed, **options):
    """A BF16 layer and one with the same weights in FP8."""
    torch.manual_seed(seed)
    plain = layers.Linear(k, n, **options)
    with RECIPES[recipe].weights():
        small = layers.Linear(k, n, **options)
    return plain, small


def in_fp8(recipe, layer, x):
    with RECIPES[recipe].compute():
        return layer(x)


@given(sizes, sizes, sizes, st.sampled_from(["tensor", "row", "block"]), st.integers(0, 2**31))
def test_emulated_product_is_that_of_scaled_mm(m, n, k, scaling, seed):
    """Both against the exact product of the FP8 values; the CPU's torch._scaled_mm takes one scale a tensor."""
    generator = torch.Generator().manual_seed(seed)
    x = quantize(torch.randn(m, k, generator=generator).bfloat16(), scaling)
    w = quantize(torch.randn(n, k, generator=generator).bfloat16(), scaling, block=WEIGHT_BLOCK)
    exact = dequantize(x, torch.float64) @ dequantize(w, torch.float64).t()
    products = dequantize(x, torch.float64).abs() @ dequantize(w, torch.float64).abs().t()
    ulp = 2.0**-8 * exact.abs() + 2.0**-20 * products  # half a step of bfloat16
    assert bool(((layers.scaled_product(x, w).double() - exact).abs() <= ulp).all())
    if scaling == "tensor":
        theirs = torch._scaled_mm(x.values, w.values.t(), x.inverse, w.inverse, out_dtype=torch.bfloat16)
        assert bool(((theirs.double() - exact).abs() <= ulp).all())


@settings(max_examples=40)
@given(
    st.sampled_from(["current", "block", "row", "weights"]),
    st.integers(1, 40),
    sizes,
    sizes,
    st.integers(0, 2**31),
)
def test_layer_error_is_bounded_by_the_format(recipe, tokens, n, k, seed):
    """|y8 - y| <= sum |x||w| ((1 + u)^2 - 1), u = half a step of E4M3, plus what underflows and BF16's rounding."""
    plain, small = pair(recipe, n, k, seed, bias=False)
    load_quantized(small, plain, RECIPES[recipe])
    x = torch.randn(tokens, k).bfloat16()
    exact = x.double() @ plain.weight.double().t()
    info = torch.finfo(E4M3)
    u, tiny = info.eps / 2, info.smallest_normal * info.eps / 2 / 224  # a scale maps the maximum to 224 ... 448
    x_off = u * x.double().abs() + tiny * x.double().abs().max()
    w_off = u * plain.weight.double().abs() + tiny * plain.weight.double().abs().max()
    x_abs, w_abs = x.double().abs(), plain.weight.double().abs()
    bound = x_off @ w_abs.t() + x_abs @ w_off.t() + x_off @ w_off.t() + 2.0**-8 * (x_abs @ w_abs.t())
    assert bool(((in_fp8(recipe, small, x).double() - exact).abs() <= bound).all())


def test_fp8_layers_hold_no_second_copy_and_half_the_bytes():
    plain, small = pair("row", 512, 512, 0, bias=False)
    assert held_bytes(small) / held_bytes(plain) == pytest.approx(0.5, abs=0.01)
    assert all(t.element_size() == 1 or t.numel() <= 512 for t in [*small.parameters(), *small.buffers()])


def test_bias_and_leading_dimensions():
    plain, small = pair("row", 32, 64, 0)
    plain.bias.data.normal_()
    load_quantized(small, plain, RECIPES["row"])
    x = torch.randn(2, 3, 64).bfloat16()
    assert in_fp8("row", small, x).shape == (2, 3, 32)
    assert torch.equal(in_fp8("row", small, x)[1], in_fp8("row", small, x[1]))
    assert torch.allclose(in_fp8("row", small, x * 0)[0, 0], plain.bias)


def test_outside_autocast_an_fp8_layer_computes_in_bf16():
    """As Transformer Engine's do: the weights are what FP8 left of them, the inputs are not rounded."""
    plain, small = pair("row", 32, 64, 0, bias=False)
    load_quantized(small, plain, RECIPES["row"])
    x = torch.randn(5, 64).bfloat16()
    assert torch.equal(small(x), x @ dequantize(quantize(plain.weight, "row")).t())
    assert not torch.equal(small(x), in_fp8("row", small, x))


def test_delayed_scaling_needs_calibration():
    """Inputs of a thousand saturate at 448 with scale 1, and are represented after calibration."""
    x = torch.randn(64, 64).bfloat16() * 1000
    errors = {}
    for batches in ([], [x, x]):
        plain, small = pair("delayed", 64, 64, 0, bias=False)
        calibrate(plain, RECIPES["delayed"], batches)
        load_quantized(small, plain, RECIPES["delayed"])
        errors[len(batches)] = ((in_fp8("delayed", small, x) - plain(x)).norm() / plain(x).norm()).item()
    assert errors[2] < 0.06 < 0.2 < errors[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_weight_without_a_value_or_without_a_place_is_an_error(recipe):
    """An FP8 layer would otherwise keep the weights it was made with; scales may be missing."""

    def mlp():
        return layers.LayerNormMLP(32, 64)

    plain = mlp()
    with RECIPES[recipe].weights():
        small = mlp()
    load_quantized(small, plain, RECIPES[recipe])
    del plain.fc2.input_amax
    load_quantized(small, plain, RECIPES[recipe])
    plain.fc1.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(CannotRun, match=rf"^FP8 \({recipe}\): no place for fc1\.extra$"):
        load_quantized(small, plain, RECIPES[recipe])
    del plain.fc1.extra, plain.fc2.weight, plain.fc1.norm
    with pytest.raises(CannotRun, match=r"no value for fc1\.norm\.weight, fc1\.norm\.bias, fc2\.weight$"):
        load_quantized(small, plain, RECIPES[recipe])


def test_calibration_is_remembered_as_the_maximum_and_only_inside_the_context():
    plain, _ = pair("delayed", 16, 16, 0)
    calibrate(plain, RECIPES["delayed"], [torch.full((1, 16), 3.0).bfloat16(), torch.full((1, 16), -2.0).bfloat16()])
    plain(torch.full((1, 16), 9.0).bfloat16())
    assert plain.input_amax.item() == 3.0


def test_one_scale_for_the_tensor_ties_tokens_together():
    """A large token costs the others precision with `current`, not with `row`: only then is a layer strictly causal."""
    x = torch.randn(8, 64).bfloat16()
    changed = torch.cat([x[:4], x[4:] * 30_000])
    for recipe, same in (("row", True), ("current", False)):
        plain, small = pair(recipe, 64, 64, 0, bias=False)
        load_quantized(small, plain, RECIPES[recipe])
        assert torch.equal(in_fp8(recipe, small, x)[:4], in_fp8(recipe, small, changed)[:4]) is same


@given(st.integers(1, 70), st.integers(1, 3))
def test_padding_is_invisible_to_the_caller_and_complete_for_the_layer(tokens, batch):
    seen = []

    def layer(rows):
        seen.append(rows)
        return rows.repeat(1, 2) + 1

    x = torch.randn(batch, tokens, 4)
    y = padded_rows(layer, x)
    assert torch.equal(y, x.repeat(1, 1, 2) + 1)
    assert seen[0].shape[0] % 16 == 0 and seen[0].shape[0] - batch * tokens < 16
    assert bool((seen[0][batch * tokens :] == 0).all())


def test_mlp_is_its_parts():
    torch.manual_seed(0)
    mlp = layers.LayerNormMLP(32, 64, bias=False)
    x = torch.randn(5, 32).bfloat16()
    norm = torch.nn.functional.layer_norm(x, (32,), mlp.fc1.norm.weight, mlp.fc1.norm.bias)
    by_hand = torch.nn.functional.gelu(norm @ mlp.fc1.weight.t(), approximate="tanh") @ mlp.fc2.weight.t()
    assert torch.allclose(mlp(x), by_hand)


def test_sizes_that_fp8_cannot_take():
    require_multiples(width=64)
    with pytest.raises(CannotRun, match=r"--hidden-size is 4100: .* multiple of 16, for example 4096"):
        require_multiples(**{"--hidden-size": 4100})
