"""The crossover by counting FLOPs and bytes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.continuous_batching.roofline import crossover
from common.gpu import PEAKS, Peak
from common.models import SHAPES, kv_bytes_per_token

H100 = PEAKS["NVIDIA H100 80GB HBM3"]


@given(
    st.sampled_from(["llama-3-8b", "deepseek-coder-33b", "deepseek-coder-1.3b"]),
    st.booleans(),
    st.integers(1, 600),
    st.integers(0, 4000),
)
def test_at_the_crossover_computing_takes_as_long_as_the_memory(shape, fp8, tokens, context):
    config = SHAPES[shape]
    batch, why = crossover(H100, config, fp8, kv_bytes_per_token(config, 1 if fp8 else 2), tokens, context)
    assert "591" in why or "295" in why or "never" in why
    itemsize, flops_per_s = (1, H100.fp8_flops) if fp8 else (2, H100.bf16_flops)
    hidden, mlp, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    matrices = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp) + config["vocab_size"] * hidden

    def seconds(batch):
        computing = batch * tokens * 2 * matrices / flops_per_s
        cache = batch * context * kv_bytes_per_token(config, itemsize)
        return computing, (matrices * itemsize + cache) / H100.bytes_per_s

    if math.isinf(batch):
        computing, memory = seconds(10**9)
        assert computing < memory
    else:
        computing, memory = seconds(batch)
        assert computing == pytest.approx(memory, rel=0.001)  # norms are counted as weights, too


def test_what_is_not_known_is_not_guessed():
    llama = SHAPES["llama-3-8b"]
    mixtral = SHAPES["mixtral-8x7b"]
    for found in (crossover(Peak(), llama, False, 2**17, 1, 64), crossover(H100, mixtral, False, 2**17, 1, 64)):
        assert found[0] is None and found[1].startswith("unknown")
