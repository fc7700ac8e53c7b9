from argparse import Namespace

import pytest

from ch16.parts.inference_serving.flags import precisions
from common.cli import CannotRun
from common.gpu import Machine, Peak
from common.models import SHAPES, Model

H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", 1, 80 << 30, 16, (9, 0), True, True, Peak())
SMALL = Model("p", "llama-3-8b", SHAPES["llama-3-8b"], dummy=True)


def test_a_checkpoint_that_is_quantized_already_cannot_be_compared():
    awq = Model("p", "awq-model", SHAPES["llama-3-8b"] | {"quantization_config": {"quant_method": "awq"}})
    both = Namespace(compare_bf16=True, quantization="auto")
    with pytest.raises(CannotRun, match="awq-model is quantized already"):
        precisions(both, awq, H100)
    assert precisions(both, SMALL, H100) == ("none", "fp8")
    assert precisions(Namespace(compare_bf16=False, quantization="auto"), awq, H100) == ("auto",)
