import math

import pytest

from common import models
from common.cli import CannotRun
from common.loadclient import Endpoint, Objective, RequestLoad, _steady, flags_for, run_load
from common.server import ServerProcess, free_port
from common.standin import MODEL, standin_command
from common.traces import BUNDLED, at_rate, read_trace, shrink

OBJECTIVE = Objective(ttft_ms=1e6, tpot_ms=1e6)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standin")
    with ServerProcess(standin_command("--step-ms", "2", "--slots", "4"), folder) as server:
        yield Endpoint(server.url, MODEL, models.bundled().path)


def test_flags(tmp_path):
    target = Endpoint("http://a:1", "m", "t")
    load = RequestLoad(10, 64, 8, rate=2.5, burstiness=0.5, tokens_shared=16, at_once=3)
    flags = " ".join(flags_for(target, load, Objective(200, 20), 7, tmp_path / "t"))
    for part in (
        "--base-url http://a:1",
        "--model m",
        "--num-prompts 10",
        "--seed 7",
        "--request-rate 2.5",
        "--burstiness 0.5",
        "--random-input-len 48",
        "--random-prefix-len 16",
        "--random-output-len 8",
        "--max-concurrency 3",
        "--goodput ttft:200 tpot:20",
    ):
        assert part in flags
    assert "inf" in " ".join(flags_for(target, RequestLoad(10, 64, 8), None, 0, tmp_path / "t"))


def result(*requests):
    """As vLLM's client returns it: the start, the time to the first event, the gaps after it, the tokens."""
    keys = ("start_times", "ttfts", "itls", "output_lens")
    return {key: list(values) for key, values in zip(keys, zip(*requests, strict=True), strict=True)} | {
        "output_throughput": 7.0
    }


def test_the_rate_of_the_middle_half_of_the_tokens():
    steady = (0.0, 1.0, [1.0] * 7, 8)  # at 1, 2 ... 8 s; the middle half are those from 3 to 7 s
    assert _steady(result(steady)) == pytest.approx(1.0)
    # Two tokens in each event are twice as many a second.
    assert _steady(result((0.0, 1.0, [1.0] * 7, 16))) == pytest.approx(2.0)
    # Five tokens in three events, at 1, 1, 2, 2 and 3 s; the middle half: from the second to the fourth.
    assert _steady(result((0.0, 1.0, [1.0, 1.0], 5))) == pytest.approx(2.0)
    # An event without a token, as the last one of an answer may be.
    assert _steady(result((0.0, 1.0, [1.0] * 8, 8))) == pytest.approx(1.0)


def test_a_failed_request_has_no_tokens():
    steady = (100.0, 1.0, [1.0] * 7, 8)
    refused, broken = (0.0, 0.0, [], 0), (0.0, 1.0, [1.0, 1.0], 0)
    assert _steady(result(steady, refused, refused, broken)) == pytest.approx(1.0)


@pytest.mark.parametrize("requests", [[(0.0, 1.0, [], 4)], [(0.0, 1.0, [], 0)]])
def test_without_a_span_the_rate_is_that_of_the_whole_run(requests):
    assert _steady(result(*requests)) == 7.0


@pytest.mark.slow
def test_a_row_of_figures(target):
    row = run_load(target, RequestLoad(12, 32, 5, rate=200.0), OBJECTIVE)
    assert row["errors"] == 0 and row["good_percent"] == pytest.approx(100) and row["goodput"] == row["answered"]
    assert row["tokens_per_s"] == pytest.approx(5 * row["answered"])
    assert row["offered"] > 0 and row["late_ms"] >= 0 and row["steady_tokens_per_s"] > 0
    for figure in ("ttft", "tpot", "itl", "e2el"):
        assert 0 < row[f"{figure}_p50_ms"] <= row[f"{figure}_p90_ms"] <= row[f"{figure}_p99_ms"]
    assert row["e2el_p50_ms"] > row["ttft_p50_ms"]

    hopeless = run_load(target, RequestLoad(4, 32, 5, at_once=2), Objective(1e-3, 1e6))
    assert hopeless["goodput"] == hopeless["good_percent"] == 0 and hopeless["offered"] is None

    trace = at_rate(shrink(read_trace(BUNDLED), 1 / 64, 100)[:20], 20, 200.0)
    replayed = run_load(target, RequestLoad(20, 1, 1, trace=trace), OBJECTIVE)
    sent = sum(arrival.tokens_out for arrival in trace)
    assert replayed["tokens_per_s"] * replayed["seconds"] == pytest.approx(sent) and replayed["offered"] > 0


@pytest.mark.slow
def test_a_server_that_is_gone():
    target = Endpoint(f"http://127.0.0.1:{free_port()}", MODEL, models.bundled().path)
    with pytest.raises(CannotRun) as error:
        run_load(target, RequestLoad(2, 8, 2, rate=math.inf))
    assert "\n" not in str(error.value)
