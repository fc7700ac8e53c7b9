"""FP8 numerics against float64: the nearest of the format's values, found by search, and bounds from the format."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import fp8
from common.fp8 import E4M3, E5M2, decode, dequantize, quantize

DTYPES = [E4M3, E5M2]
BLOCKS = [(1, 128), (128, 128), (2, 3), (1, 1)]


def grid(dtype):
    """All finite values of a format, in float64, computed from its definition: (-1)^s 2^(e - bias) (1 + m / 2^M)."""
    exponent_bits, mantissa_bits = {E4M3: (4, 3), E5M2: (5, 2)}[dtype]
    bias, values = 2 ** (exponent_bits - 1) - 1, []
    for e in range(2**exponent_bits):
        for m in range(2**mantissa_bits):
            fraction = m / 2**mantissa_bits
            values.append(2.0 ** (1 - bias) * fraction if e == 0 else 2.0 ** (e - bias) * (1 + fraction))
    largest = torch.finfo(dtype).max  # above it stand infinity and NaN
    positive = sorted(v for v in values if v <= largest)
    return torch.tensor([-v for v in reversed(positive)] + positive[1:], dtype=torch.float64)


@st.composite
def matrices(draw):
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, columns, generator=generator) * 2.0 ** draw(st.integers(-20, 20))
    if draw(st.booleans()):  # an outlier, and a row of zeros
        x[draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))] *= 1000
        x[0] = 0
    return x.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


def error_and_half_a_step(x, q, dtype):
    """How far each value is off, in float64, and half the distance of the format's values there."""
    info, inverse = torch.finfo(dtype), q.scaled(torch.ones_like(x, dtype=torch.float32)).double()
    half_a_step = torch.maximum(info.eps / 2 * x.double().abs(), info.smallest_normal * info.eps / 2 * inverse)
    return (dequantize(q, torch.float64) - x.double()).abs(), half_a_step


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_format_is_what_its_definition_says(dtype):
    bits = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    finite = bits[bits.isfinite()].unique()
    assert torch.equal(finite, grid(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_is_exact_for_every_bit_pattern(dtype):
    values = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert torch.equal(decode(values, torch.float32).nan_to_num(7e30), values.float().nan_to_num(7e30))


@given(matrices(), st.sampled_from(fp8.SCALINGS[1:]), st.sampled_from(DTYPES), st.sampled_from(BLOCKS))
def test_every_value_is_rounded_to_the_nearest(x, scaling, dtype, block):
    """Against a search over all values of the format, in float64."""
    q = quantize(x, scaling, dtype, block)
    scale = 1 / q.scaled(torch.ones_like(x, dtype=torch.float32)).double()
    target = x.double() * scale
    values = grid(dtype)
    above = torch.searchsorted(values, target).clamp(1, len(values) - 1)
    nearest = torch.minimum((values[above] - target).abs(), (values[above - 1] - target).abs())
    assert torch.equal((q.values.double() - target).abs(), nearest)


@given(matrices(), st.sampled_from(fp8.SCALINGS[1:]), st.sampled_from(DTYPES), st.sampled_from(BLOCKS))
def test_error_is_bounded_by_the_format(x, scaling, dtype, block):
    error, half_a_step = error_and_half_a_step(x, quantize(x, scaling, dtype, block), dtype)
    assert bool((error <= half_a_step).all())


@given(matrices(), st.sampled_from(DTYPES), st.sampled_from(BLOCKS))
def test_a_scale_is_a_power_of_two_that_fills_the_range(x, dtype, block):
    for scaling in fp8.SCALINGS[1:]:
        q = quantize(x, scaling, dtype, block)
        mantissa, _ = torch.frexp(q.inverse)
        assert bool((mantissa == 0.5).all())
        amax = fp8.absolute_maximum(x, scaling, block).double()
        full = amax / q.inverse.double() / torch.finfo(dtype).max
        assert bool(((full <= 1) & (full > 0.5))[amax > 0].all())


@given(matrices(), st.sampled_from(fp8.SCALINGS[1:]), st.sampled_from(DTYPES), st.floats(0.5, 1))
def test_a_fill_brings_the_maximum_to_its_share_of_the_range(x, scaling, dtype, fill):
    q = quantize(x, scaling, dtype, fill=fill)
    amax = fp8.absolute_maximum(x, scaling).double()
    share = amax / q.inverse.double() / torch.finfo(dtype).max
    assert torch.allclose(share[amax > 0], torch.tensor(fill, dtype=torch.float64), rtol=1e-5)
    error, half_a_step = error_and_half_a_step(x, q, dtype)
    assert bool((error <= half_a_step * (1 + 1e-4) + 1e-6 * x.double().abs()).all())  # the scale itself rounds


@given(matrices(), st.sampled_from(BLOCKS))
def test_block_maxima_against_loops(x, block):
    rows, columns = block
    found = fp8.absolute_maximum(x, "block", block)
    assert found.shape == (math.ceil(x.shape[0] / rows), math.ceil(x.shape[1] / columns))
    for i, line in enumerate(x.split(rows, 0)):
        for j, part in enumerate(line.split(columns, 1)):
            assert found[i, j] == part.abs().max()
    assert fp8.absolute_maximum(x, "tensor") == x.abs().max()
    assert torch.equal(fp8.absolute_maximum(x, "row"), x.abs().amax(1, keepdim=True))


def test_too_large_saturates_and_nan_stays():
    x = torch.tensor([[1e6, -1e6, 1.0]])
    assert quantize(x, "none").values.float().tolist() == [[448.0, -448.0, 1.0]]
    assert quantize(x, "none", E5M2).values.float().tolist() == [[57344.0, -57344.0, 1.0]]
    known = quantize(x, "tensor", amax=torch.tensor(1.0))
    assert known.scaled(known.values.float()).tolist() == [[1.75, -1.75, 1.0]]
    assert quantize(torch.tensor([[float("nan"), 1.0]]), "tensor").values.float().isnan().tolist() == [[True, False]]


@pytest.mark.parametrize(("x", "scaling"), [(torch.ones(3), "row"), (torch.ones(2, 2), "column")])
def test_errors(x, scaling):
    with pytest.raises(ValueError):
        quantize(x, scaling)
