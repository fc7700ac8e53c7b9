"""Sizes fit the engine and each other; lengths of answers by their distribution; the same requests for one seed."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.continuous_batching.bounds import bound
from ch16.parts.continuous_batching.workload import (
    AdmissionLoad,
    Traffic,
    geometric_lengths,
    sizes_for,
    traffic_requests,
)
from common.gpu import Machine

CPU = Machine("cpu", "a CPU", 1, 2**40, 2, None, True, False)
H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", 1, 80 * 2**30, 16, (9, 0), True, True)
TRAFFIC = Traffic(streams=3, tokens=20, prompt=60, every=5, budgets=(33, 13), rounds=1)


@pytest.mark.parametrize("machine", [CPU, H100])
@pytest.mark.parametrize("quick", [True, False])
def test_sizes_fit_together(machine, quick):
    sizes = sizes_for(machine, quick)
    traffic = sizes.traffic
    assert sizes.budget >= max(traffic.prompt + traffic.streams, sizes.prefill.batches[-1] * sizes.prefill.tokens)
    assert sizes.context <= sizes.max_model_len and sizes.load.requests % sizes.load.slots == 0
    assert max(traffic.streams, sizes.load.slots) <= sizes.decode.batches[-1] < sizes.budget
    assert traffic.every <= 100  # more than one of a hundred gaps is disturbed: P99 sees it
    assert traffic.prompts >= 3 and traffic.streams < min(traffic.budgets) < max(traffic.budgets) < traffic.prompt


@given(st.integers(0, 100))
def test_geometric_lengths(seed):
    load = AdmissionLoad(slots=8, requests=4000, tokens_in=8, tokens_out=32, rounds=1)
    lengths = geometric_lengths(load, seed)
    assert lengths == geometric_lengths(load, seed) and len(lengths) == 4000
    assert min(lengths) >= 1 and max(lengths) <= load.longest
    assert sum(lengths) / 4000 == pytest.approx(32, rel=0.15)
    harmonic = sum(1 / n for n in range(1, 9))
    assert bound(lengths, 8) == pytest.approx(harmonic, rel=0.15)


def test_traffic_is_the_same_for_the_same_seed():
    assert traffic_requests(TRAFFIC, 100, 0) == traffic_requests(TRAFFIC, 100, 0)
    assert traffic_requests(TRAFFIC, 100, 0) != traffic_requests(TRAFFIC, 100, 1)
    streams, long = traffic_requests(dataclasses.replace(TRAFFIC, tokens=10), 100, 0)
    assert (len(streams), len(long)) == (3, 1) and streams[0].tokens_out == 11 and len(long[0].prompt) == 60
