import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.kv_cache_monitor.arithmetic import kv_shape
from common.cli import CannotRun
from common.models import SHAPES

LATENT = {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 128}
WINDOW = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 100,
}
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2}


def test_grouped_query_attention_by_hand():
    """Keys and values of 8 heads of 128 numbers, two bytes each, in 32 and 62 layers."""
    assert kv_shape(SHAPES["llama-3-8b"]).bytes_per_token == 131_072
    assert kv_shape(SHAPES["deepseek-coder-33b"]).bytes_per_token == 253_952


@pytest.mark.parametrize("name", SHAPES)
def test_fp8_takes_half(name):
    assert 2 * kv_shape(SHAPES[name], "fp8").bytes_per_token == kv_shape(SHAPES[name]).bytes_per_token


def test_latent_attention():
    """DeepSeek-V3: 576 numbers a token and layer, 70 kB in all, where 128 heads of keys and values would take 4 MB."""
    assert kv_shape(LATENT).bytes_per_token == 61 * 576 * 2 == 70_272


def test_sliding_windows_by_hand():
    each = 2 * 2 * 16 * 2
    assert kv_shape(WINDOW).sequence_bytes(1000) == 4 * each * 100
    assert kv_shape(WINDOW).sequence_bytes(30) == 4 * each * 30
    assert kv_shape(MIXED).sequence_bytes(1000) == 2 * each * 1000 + 2 * each * 100
    assert kv_shape(WINDOW | {"use_sliding_window": False}).sequence_bytes(1000) == 4 * each * 1000


@given(st.integers(0, 5000), st.sampled_from([WINDOW, MIXED, LATENT]))
def test_a_longer_sequence_never_takes_less(tokens, config):
    shape = kv_shape(config)
    assert shape.sequence_bytes(tokens) <= shape.sequence_bytes(tokens + 1) <= (tokens + 1) * shape.bytes_per_token


def test_errors():
    with pytest.raises(CannotRun, match="does not list which layers"):
        kv_shape(WINDOW | {"max_window_layers": 2})
    with pytest.raises(CannotRun, match="unknown KV cache type 'int3'"):
        kv_shape(WINDOW, "int3")
    with pytest.raises(CannotRun, match="has no 'num_hidden_layers'"):
        kv_shape({})
