"""The planner's arithmetic, by hand."""

import pytest

from ch16.parts.moe_benchmark.planner import (
    Link,
    Parts,
    Workload,
    fits,
    gpus_needed,
    link_between_gpus,
    memory_per_rank,
    predict,
)
from ch16.parts.moe_benchmark.presets import PRESETS, Preset
from common.cli import CannotRun
from common.gpu import Machine, Peak, detect

TEN = Preset(
    "ten", hidden=100, intermediate=50, experts=8, top_k=2, layers=10, heads=4, kv_heads=2, head_dim=25, vocab=1000
)


def test_a_workload_by_hand():
    work = Workload(sequences=100, tokens_in=200, tokens_out=50, chunk=8000)
    assert work.prefill_steps() == 3  # 20,000 tokens
    assert work.prefill_sequences(1) == 33
    assert (work.rank_sequences(8), work.prefill_steps(8)) == (13, 1)  # 2,600 tokens on the fullest rank
    assert work.prefill_sequences(8) == 13
    assert work.context == 225


def test_a_prompt_longer_than_a_chunk_takes_several_steps():
    work = Workload(sequences=2, tokens_in=1000, tokens_out=10, chunk=400)
    assert work.prefill_steps() == 5 and work.prefill_sequences(1) == 1


def test_a_prediction_by_hand():
    work = Workload(sequences=100, tokens_in=200, tokens_out=51, chunk=8000)
    row = predict(
        TEN, work, prefill=Parts(layer=0.010, head=0.005), decode=Parts(layer=0.001, head=0.002, exchange=0.0008)
    )
    assert row["prefill_s"] == pytest.approx(3 * (10 * 0.010 + 0.005))
    assert row["decode_step_ms"] == pytest.approx(1e3 * (10 * 0.0018 + 0.002))
    assert row["tokens_per_s"] == pytest.approx(100 * 51 / (0.315 + 50 * 0.020))


def test_exchange_by_hand():
    link = Link(1e9, "test")
    assert link.exchange_seconds(rows=1000, hidden=500, ranks=4) == pytest.approx(2 * 1000 * 500 * 2 * 0.75 / 1e9)
    assert link.exchange_seconds(1000, 500, ranks=1) == 0.0
    assert Link(None, "unknown").exchange_seconds(1000, 500, ranks=1) == 0.0
    late = Link(1e9, "test", latency_s=25e-6)
    assert late.exchange_seconds(1000, 500, ranks=4) == pytest.approx(link.exchange_seconds(1000, 500, 4) + 50e-6)
    with pytest.raises(CannotRun, match="--link-gb-s"):
        Link(None, "unknown").exchange_seconds(1000, 500, ranks=2)


def test_which_link():
    h100 = Machine("cuda", "x", 1, 1, 1, (9, 0), True, True, Peak(link_bytes_per_s=450e9))
    sheet, given = link_between_gpus(h100, None, None), link_between_gpus(h100, 50, 20)
    assert (sheet.bytes_per_s, sheet.latency_s) == (
        450e9,
        0,
    ) and "450 GB/s by the data sheet, latency not" in sheet.source
    assert (given.bytes_per_s, given.latency_s) == (
        50e9,
        pytest.approx(20e-6),
    ) and given.source == "50 GB/s as given after 20 us"
    assert link_between_gpus(detect("cpu"), None, None).bytes_per_s is None


def test_memory_by_hand():
    experts = 10 * 8 * 3 * 100 * 50
    other = 10 * (100 * 25 * 2 * (4 + 2) + 100 * 8) + 2 * 1000 * 100
    assert (TEN.expert_parameters, TEN.other_parameters) == (experts, other)
    memory = memory_per_rank(TEN, Workload(6, 20, 10), ranks=4)
    assert memory == {"weights": 2 * (experts / 4 + other), "kv_cache": 2 * 30 * (2 * 2 * 10 * 2 * 25)}
    assert fits(memory, sum(memory.values()) / 0.89) and not fits(memory, sum(memory.values()) / 0.91)


def test_gpus_needed():
    rows = [
        {"gpus": 1, "fits": "no", "tokens_per_s": 900.0},
        {"gpus": 2, "fits": "yes", "tokens_per_s": 1500.0},
        {"gpus": 4, "fits": "yes", "tokens_per_s": 2500.0},
    ]
    assert [gpus_needed(rows, target) for target in (800, 1501, 3000)] == ["2 GPUs", "4 GPUs", "more than 4 GPUs"]
    assert [gpus_needed(rows[:1], 800), gpus_needed(rows[1:], 1500)] == ["more than 1 GPU", "2 GPUs"]
    assert gpus_needed([{"gpus": 1, "fits": "yes", "tokens_per_s": 900.0}], 900) == "1 GPU"
    assert gpus_needed([rows[0] | {"gpus": 8}], 800) == "more than 8 GPUs"


@pytest.mark.parametrize(
    ("name", "billions"),
    [("mixtral-8x7b", 46.7), ("qwen3-30b-a3b", 30.5), ("olmoe-1b-7b", 6.9), ("qwen3-235b-a22b", 235)],
)
def test_published_sizes(name, billions):
    """Totals as the model cards give them."""
    assert PRESETS[name].parameters / 1e9 == pytest.approx(billions, rel=0.01)
