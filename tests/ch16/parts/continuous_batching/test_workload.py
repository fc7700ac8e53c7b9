"""Lengths of answers by their distribution; the same requests for the same seed."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.continuous_batching.bounds import bound
from ch16.parts.continuous_batching.sizes import AdmissionLoad, Traffic
from ch16.parts.continuous_batching.workload import geometric_lengths, traffic_requests

TRAFFIC = Traffic(streams=3, tokens=20, prompt=60, every=5, budgets=(33, 13), rounds=1)


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
