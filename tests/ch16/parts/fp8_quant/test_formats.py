import pytest
import torch

from ch16.parts.fp8_quant import formats
from common.fp8 import E4M3, E5M2, SCALINGS


@pytest.mark.parametrize(("name", "dtype"), [("E4M3", E4M3), ("E5M2", E5M2)])
def test_a_row_says_what_the_bit_patterns_say(name, dtype):
    values = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    finite = values[values.isfinite()].unique()
    row = formats.format_row(name)
    assert row["largest"] == finite.max() and row["smallest"] == finite[finite > 0].min()
    assert row["steps"] == ((finite >= 1) & (finite < 2)).sum()


def test_finer_scales_lose_less_where_rows_differ():
    """Rows of very different size: one scale for all sends the small ones to zero."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 64)[:, None]
    rows = {s: formats.error_row(x, s, "E4M3", (1, 128)) for s in SCALINGS}
    assert rows["none"]["saturated_percent"] > 0 and rows["tensor"]["saturated_percent"] == 0
    assert rows["tensor"]["zeroed_percent"] > 10 > 0.5 > rows["row"]["zeroed_percent"]
    assert rows["row"]["row_error_percent"] < 4 < 20 < rows["tensor"]["row_error_percent"]
