"""What lengths allow, by property and against counting step by step; the crossover by counting FLOPs and bytes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.continuous_batching.bounds import (
    batches_of,
    bound,
    bound_by_time,
    crossover,
    median_run,
    step_seconds,
)
from common.gpu import PEAKS, Peak
from common.models import SHAPES, kv_bytes_per_token
from tests.timelines import timeline

H100 = PEAKS["NVIDIA H100 80GB HBM3"]
lengths_and_slots = st.tuples(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 9))


def steps_of_fixed_batches(lengths, slots):
    """How many requests run in each step, counted one step at a time."""
    running = []
    for i in range(0, len(lengths), slots):
        left = list(lengths[i : i + slots])
        while any(left):
            running.append(sum(n > 0 for n in left))
            left = [max(0, n - 1) for n in left]
    return running


@given(lengths_and_slots)
def test_the_bound_by_counting(case):
    lengths, slots = case
    steps = steps_of_fixed_batches(lengths, slots)
    assert sum(steps) == sum(lengths)
    assert bound(lengths, slots) == pytest.approx(len(steps) * slots / sum(lengths))
    assert bound(lengths, slots) >= 1 - 1e-12


@given(lengths_and_slots, st.floats(0.001, 1), st.floats(0, 1))
def test_the_bound_by_time_by_counting(case, base, part):
    """Steps of base + part * running seconds, of which the measurement knows one and ten."""
    lengths, slots = case
    fixed = sum(base + part * n for n in steps_of_fixed_batches(lengths, slots))
    full = sum(lengths) / slots * (base + part * slots)
    found = bound_by_time(lengths, slots, {1: base + part, 10: base + 10 * part})
    assert found == pytest.approx(fixed / full)
    assert found <= bound(lengths, slots) + 1e-9


def test_steps_that_cost_nothing_alone_leave_nothing_to_gain():
    """If a step costs as much as it has requests, emptier steps are cheaper, and a fixed batch loses nothing."""
    assert bound_by_time([1, 9, 3, 3], 2, {1: 1.0, 2: 2.0}) == pytest.approx(1.0)
    assert bound([1, 9, 3, 3], 2) == pytest.approx(12 / 8)


def test_batches_keep_all_in_order():
    assert batches_of([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]


def test_the_median_run_is_not_the_disturbed_one():
    runs = [timeline(steps=[(1.0, 1), (1.0 + seconds, 1)]) for seconds in (3.0, 99.0, 4.0)]
    assert median_run(runs) is runs[2]


def test_step_seconds_leave_out_steps_that_read_a_prompt():
    run = timeline(
        sent={"a": 0.0, "b": 0.1, "c": 13.0},
        steps=[(10.0, 2), (12.0, 2), (13.0, 1), (50.0, 2), (53.0, 2), (57.0, 2), (58.5, 1)],
    )
    assert step_seconds(run) == {1: pytest.approx(1.25), 2: 3.0}
    run.ahead = 1  # "c" came when the fourth step was under way already: the fifth read it
    assert step_seconds(run) == {1: pytest.approx(1.25), 2: pytest.approx((37 + 4) / 2)}


# ---- the roofline ----


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
