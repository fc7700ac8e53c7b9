from dataclasses import replace

import pytest
import torch

from ch16.moe_benchmark import grouped
from ch16.parts.moe_benchmark.capacity import Capacity
from ch16.parts.moe_benchmark.planner import Link, Workload
from ch16.parts.moe_benchmark.presets import Preset
from common.gpu import detect

MACHINE = replace(detect("cpu"), native_bf16=True)

SMALL = Preset("small", 64, 32, 8, 2, layers=3, heads=4, kv_heads=2, head_dim=16, vocab=100)
WORK = Workload(sequences=4, tokens_in=8, tokens_out=5, chunk=64)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_plans_row_is_made_of_its_parts(ranks):
    capacity = Capacity(SMALL, grouped, MACHINE, Link(1e9, "test"), repeats=2, seed=0)
    row = capacity.plan_row(WORK, ranks)
    assert row["gpus"] == ranks and row["fits"] == "yes"
    assert row["decode_step_ms"] == pytest.approx(3 * (row["layer_ms"] + row["exchange_ms"]) + row["head_ms"])
    rows = 4 / ranks * 2  # of one rank: sequences x experts per token
    assert row["exchange_ms"] == pytest.approx(1e3 * 2 * rows * 64 * 2 * (ranks - 1) / ranks / 1e9)
    assert row["weights_gb"] == pytest.approx(2 * (SMALL.expert_parameters / ranks + SMALL.other_parameters) / 1e9)


def test_other_ranks_are_computed_with_a_share_of_the_experts(monkeypatch):
    capacity, seen = Capacity(SMALL, grouped, MACHINE, Link(1e9, "test"), repeats=1, seed=0), []
    dispatch = capacity.dispatch
    capacity.dispatch = lambda x, experts, routing: (
        seen.append((len(x), experts.sizes.experts)),
        dispatch(x, experts, routing),
    )[1]
    torch.manual_seed(0)
    capacity.parts(WORK, 4, "decode")
    assert {experts for _, experts in seen} == {2}
    assert all(1 <= rows <= 4 * 2 for rows, _ in seen)  # at least the mean, at most all rows
