"""The knee and the crossover by property and by counting; the sweeps on an engine that counts."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ch16.parts.continuous_batching.sizes import (
    Sweep,
    crossover,
    decode_rows,
    knee_of,
    knee_row,
    marked,
    prefill_rows,
    size_claim,
)
from common.gpu import PEAKS, Peak
from common.models import SHAPES, kv_bytes_per_token

H100 = PEAKS["NVIDIA H100 80GB HBM3"]
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def rows_of(base_ms, part_ms, batches=BATCHES):
    """A step takes base + part * batch."""
    return marked(
        [{"batch": b, "ms": base_ms + part_ms * b, "tokens_per_s": 1e3 * b / (base_ms + part_ms * b)} for b in batches]
    )


@given(st.floats(0.1, 100), st.floats(0.01, 10))
def test_the_knee_is_where_what_all_share_costs_as_much_as_what_each_adds(base, part):
    assume(2 < base / part < 128)
    first, last = knee_of(rows_of(base, part))
    # Within 10% of the highest power, x / (1 + x)^2 for x = batch / (base / part), is within a factor of two.
    assert base / part / 2.1 < first["batch"] <= last["batch"] < 2.1 * base / part


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=9))
def test_the_knee_by_looking_at_all(ms):
    rows = marked([{"batch": 2**i, "ms": t, "tokens_per_s": 1e3 * 2**i / t} for i, t in enumerate(ms)])
    power = [2**i / t**2 for i, t in enumerate(ms)]
    best = max(power)
    assert [bool(row["mark"]) for row in rows if not 0.899 < row["tokens_per_s"] / row["ms"] / best / 1e3 < 0.901] == [
        p > 0.9 * best for p in power if not 0.899 < p / best < 0.901
    ]


@pytest.mark.parametrize(
    ("phase", "base", "part", "verdict"),
    [
        ("decode", 64, 1, "holds"),
        ("decode", 24, 1, "holds"),  # 16 to 32
        ("decode", 8, 1, "fails"),
        ("decode", 1000, 1, "fails"),  # at 256, beyond the chapter's
        ("prefill", 0, 1, "holds"),
        ("prefill", 32, 1, "fails"),
    ],
)
def test_the_claims(phase, base, part, verdict):
    found = size_claim(phase, rows_of(base, part))
    assert found.verdict == verdict and found.measured.startswith("knee at ")


def test_a_knee_at_the_end_of_what_was_measured_may_be_beyond():
    found = size_claim("decode", rows_of(1000, 1, BATCHES[:5]))
    assert found.verdict == "n/a" and "16 was the largest" in found.reason
    assert size_claim("decode", rows_of(1000, 1, BATCHES[:6])).verdict == "holds"  # 32 is the chapter's
    assert size_claim("prefill", rows_of(1000, 1, BATCHES[:6])).verdict == "fails"  # beyond 8 already


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
    row = knee_row("decode", rows_of(64, 1), (math.inf, "never"))
    assert row["crossover"] is None and row["knee"] == "64" and row["chapter"] == "32 to 128"
    assert knee_row("decode", rows_of(64, 1), (294.3, ""))["crossover"] == 295


def test_decode_steps_that_read_prompts_are_left_out(counting_llm):
    llm = counting_llm(budget=100)
    rows = decode_rows(llm, Sweep((1, 4, 16), tokens=30, repeats=5), vocab_size=100, seed=0)
    assert [row["batch"] for row in rows] == [1, 4, 16] and all(row["ms"] > 0 for row in rows)
    assert not llm.requests  # all were finished


def test_batches_that_do_not_fit_are_not_tried(counting_llm):
    llm = counting_llm(budget=1000)
    llm.vllm_config.cache_config.num_gpu_blocks = 13  # of 16 tokens; a sequence of 30 + 7 tokens takes 3
    rows = decode_rows(llm, Sweep((1, 4, 16), tokens=30, repeats=5), vocab_size=100, seed=0)
    assert [row["batch"] for row in rows] == [1, 4]


def test_prefill_counts_the_prompts_tokens(counting_llm):
    llm = counting_llm()
    rows = prefill_rows(llm, Sweep((1, 4), tokens=30, repeats=3), vocab_size=100, seed=0)
    assert [row["batch"] for row in rows] == [1, 4]
    assert [row["tokens_per_s"] * row["ms"] / 1e3 for row in rows] == pytest.approx([30, 120])
    assert llm.running == 3 * [1] + 3 * [4]
