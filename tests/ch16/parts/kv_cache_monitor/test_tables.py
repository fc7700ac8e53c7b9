import pytest

from ch16.parts.kv_cache_monitor.tables import bytes_rows, claims
from common.models import SHAPES, Model

CHECKED = [{"evictions": 5, "preemptions": 2, "checked": 10, "steps": 12}]
FITS = [{"fit": 1}, {"fit": 39}]


def test_bytes():
    rows = bytes_rows(Model("p", "tiny-llama", SHAPES["tiny-llama"]))
    llama = next(row for row in rows if row["model"] == "llama-3-8b" and row["dtype"] == "bfloat16")
    assert llama["kb_per_token"] == pytest.approx(2 * 32 * 8 * 128 * 2 / 1e3)  # 131 kB, as published
    assert llama["gb_at_4k"] == pytest.approx(4096 * llama["kb_per_token"] / 1e6)


def comparison(ratio, error=0.2, rounds=7):
    return {"ratio": ratio, "error_percent": error, "rounds": rounds, "requests": 8}


@pytest.mark.parametrize(
    ("no_hits", "shared", "verdict"),
    [
        (comparison(0.995), comparison(0.1), "holds"),
        (comparison(0.98), comparison(0.1), "fails"),
        (comparison(0.98, 0.6), comparison(0.1), "n/a"),  # within two standard errors of the limit
        (comparison(0.995, 0.6), comparison(0.1), "n/a"),  # noise withholds a "holds", too
        (comparison(0.97, 0.6), comparison(0.1), "fails"),
        (comparison(1.03, rounds=3), comparison(0.1), "n/a"),
        (comparison(0.8, rounds=3), comparison(0.1), "fails"),
        (comparison(1.03, rounds=3), comparison(0.5), "fails"),
        (comparison(0.98, 0.6), comparison(0.5), "fails"),
        (comparison(1.01), comparison(0.31), "fails"),
    ],
)
def test_prefix_caching(no_hits, shared, verdict):
    s5, k1, k2 = claims(CHECKED, no_hits, [comparison(0.5), shared], FITS)
    assert s5.verdict == verdict and (k1.verdict, k2.verdict) == ("holds", "holds")


@pytest.mark.parametrize("missing", ["evictions", "preemptions", "checked"])
def test_what_was_not_seen_is_not_claimed(missing):
    rows = [CHECKED[0] | {missing: 0}]
    _, k1, k2 = claims(rows, comparison(1.0), [comparison(0.1)], [{"fit": 3}, {"fit": 3}])
    assert (k1.verdict, k2.verdict) == ("fails", "fails")
