import math

import pytest
from prometheus_client.samples import Sample

from ch16.parts.monitoring.client import Reply, Scrape
from ch16.parts.monitoring.tables import bucket_rows, filled_buckets, gained_buckets, quantile_rows

BUCKETS = [(0.1, 0), (0.5, 2), (1.0, 2), (2.0, 6), (math.inf, 6)]
ANSWERS = [Reply(0.0, latency) for latency in (0.2, 0.3, 1.1, 1.2, 1.5, 1.9)]


def scrape(*counts):
    bounds = ("0.1", "0.5", "1.0", "2.0", "+Inf")
    samples = [
        Sample("inference_latency_seconds_bucket", {"le": bound}, count)
        for bound, count in zip(bounds, counts, strict=True)
    ]
    return Scrape(0.0, 0.0, samples)


def test_buckets_between_two_scrapes():
    assert gained_buckets(scrape(1, 1, 1, 1, 3), scrape(1, 3, 3, 7, 9)) == BUCKETS


def test_buckets_from_the_first_to_the_last_with_a_request():
    assert list(filled_buckets(BUCKETS)) == [(0.1, 0.5, 2), (0.5, 1.0, 0), (1.0, 2.0, 4)]
    rows = bucket_rows([*BUCKETS[:-1], (math.inf, 7)])
    assert [row["bucket"] for row in rows] == ["0.1 to 0.5", "1 to 2", "above 2"]
    assert [row["cumulative"] for row in rows] == [2, 6, 7]


def test_quantiles_are_linear_within_their_bucket():
    median, *_, last = quantile_rows(BUCKETS, ANSWERS)
    assert median["from_buckets_s"] == pytest.approx(1.25) and median["bucket"] == "1 to 2"  # the 1st of 4 in it
    assert median["clients_s"] == pytest.approx(1.15)
    assert last["from_buckets_s"] == pytest.approx(1 + 3.94 / 4) and last["quantile"] == "P99"
