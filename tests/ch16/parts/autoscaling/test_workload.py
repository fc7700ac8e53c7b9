import json

import numpy as np
import pytest

from ch16.parts.autoscaling.workload import (
    CALM,
    DAY_MEAN,
    DAY_SWING,
    PEAK,
    SHORTEST_S,
    bursty,
    diurnal,
    fitted,
    poisson,
    read_recorded,
)
from common.cli import CannotRun
from common.traces import BUNDLED, Arrival

HOUR = 3600.0


@pytest.mark.parametrize("seed", range(5))
def test_bursts_come_and_go(seed):
    at = np.arange(0, 6 * HOUR)
    load = bursty(6 * HOUR, np.random.default_rng(seed))(at)
    assert load.min() == CALM and PEAK[0] <= load.max() <= PEAK[1]
    begins = np.count_nonzero((load[:-1] == CALM) & (load[1:] > CALM))
    assert 4 <= begins <= 20
    assert np.abs(np.diff(load)).max() < PEAK[1] / 400  # nothing jumps


def test_the_day_has_its_mean_and_its_peak_at_noon():
    at = np.linspace(0, 1000, 1001)
    load = diurnal(1000)(at)
    assert load[:-1].mean() == pytest.approx(DAY_MEAN) and load.argmax() == 500
    assert load[0] == load.min() == pytest.approx(DAY_MEAN * (1 - DAY_SWING))


def test_arrivals_follow_the_load():
    lengths = [Arrival(0.0, 10, 1), Arrival(1.0, 30, 3)]
    load = lambda at: np.where(at < 1000, 2.0, 6.0)  # noqa: E731
    requests = poisson(load, 2000, 0.5, lengths, np.random.default_rng(0))
    assert (np.diff(requests["at_s"]) >= 0).all() and requests["at_s"].max() < 2000
    first = np.count_nonzero(requests["at_s"] < 1000)
    assert first == pytest.approx(4000, abs=5 * 4000**0.5)
    assert len(requests) - first == pytest.approx(12_000, abs=5 * 12_000**0.5)
    assert {(row["tokens_in"], row["tokens_out"]) for row in requests} == {(10, 1), (30, 3)}


def write(path, seconds):
    rows = [{"timestamp": 1e3 * at, "input_length": 10, "output_length": 5, "hash_ids": []} for at in seconds]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_short_recording_is_begun_anew_at_its_own_rate():
    trace = read_recorded(BUNDLED, 60)
    assert trace[-1].at_s == pytest.approx(SHORTEST_S, rel=0.01)
    assert trace[1].at_s == pytest.approx(4.314579, rel=0.01)
    requests = fitted(trace, lambda tokens_in, tokens_out: 0.001 * tokens_in + 0.01 * tokens_out, 4000)
    work_s = (0.001 * requests["tokens_in"] + 0.01 * requests["tokens_out"]).sum()
    assert work_s / requests["at_s"][-1] == pytest.approx(DAY_MEAN, rel=0.02)


def test_a_day_keeps_its_times(tmp_path):
    seconds = [0, 1000, 4000, 5000]
    trace = read_recorded(write(tmp_path / "day.jsonl", seconds), 3600)
    assert [arrival.at_s for arrival in trace] == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ([0, 10, 9], "goes back in time: request 3 comes 1.000 s before"),
        ([0, 100, 4000, 4001], "has a gap: no request for 1.1 h from second 100 on"),
        ([7, 7, 7], "all 3 requests come at the same time"),
        ([5], "holds 1 requests, at least 2"),
        ([0, float("nan")], "no trace of"),
    ],
)
def test_recordings_that_cannot_be_replayed(tmp_path, seconds, message):
    path = write(tmp_path / "day.jsonl", seconds)
    with pytest.raises(CannotRun, match=message) as error:
        read_recorded(path, 3600)
    assert "\n" not in str(error.value)


def test_a_longer_gap_can_be_allowed(tmp_path):
    assert len(read_recorded(write(tmp_path / "day.jsonl", [0, 100, 4000, 4001]), 4000)) == 4
