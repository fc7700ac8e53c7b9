"""On a CPU that emulates BF16 slowly, these tests take the way that the script takes."""

import pytest

from ch16.parts.fp8_quant.precision import fast_bf16
from common.gpu import detect


@pytest.fixture(autouse=True)
def bf16_in_time():
    with fast_bf16(detect("cpu")):
        yield
