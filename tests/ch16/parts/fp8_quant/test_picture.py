import pytest

from ch16.parts.fp8_quant.picture import plot
from common.fp8 import SCALINGS
from common.gpu import detect

SCALING = [
    {"tensor": "input", "format": "E4M3", "scaling": scaling, "error_percent": 2.0, "zeroed_percent": 0.1}
    for scaling in SCALINGS
]
PRODUCT = {"layer": "mlp_fc1", "BF16": 500, "limit": 990, "speedup": 1.8, "eager_speedup": 0.8}


def reading(recipe, tokens, ratio):
    return {"recipe": recipe, "tokens": tokens, "perplexity_ratio": ratio}


@pytest.mark.parametrize(
    "more",
    [
        {"accuracy": [reading("BF16", 9, 1), reading("weights", 5, 0.99)]},  # a single recipe, and a lower perplexity
        {"accuracy": [reading("BF16", 9, 1), reading("row", 5, 1.02), reading("row", 9, 1.01)]},
        {"gemm": [PRODUCT | {"tokens": tokens, "row": 900} for tokens in (16, 64)]},
    ],
)
def test_a_picture_of_what_there_is(more, tmp_path):
    tables = {"scaling": SCALING, "memory": [{"recipe": "row", "weight_ratio": 0.503}]} | more
    plot(str(tmp_path / "p.png"), tables, "a model", detect("cpu"))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
