import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.cli import CannotRun
from common.traces import (
    BUNDLED,
    Arrival,
    at_rate,
    mean_lengths,
    read_trace,
    shrink,
    write_timed_trace,
)


def test_the_bundled_trace():
    trace = read_trace(BUNDLED)
    assert len(trace) == 216 and trace[0] == Arrival(0.0, 374, 44)
    assert trace[1].at_s == pytest.approx(4.314579)  # 18:15:50.9951690 - 18:15:46.6805900
    assert trace[-1].at_s == pytest.approx(64.1867330)
    assert all(later.at_s >= earlier.at_s for earlier, later in itertools.pairwise(trace))


def test_mooncakes_form(tmp_path):
    file = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 3500, "input_length": 6000, "output_length": 20, "hash_ids": [1, 2, 9]},
        {"timestamp": 500, "input_length": 6755, "output_length": 500, "hash_ids": [1, 2, 3]},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert read_trace(file) == [Arrival(0.0, 6755, 500, (1, 2, 3)), Arrival(3.0, 6000, 20, (1, 2, 9))]


def test_a_trace_that_must_be_in_order(tmp_path):
    file = tmp_path / "trace.csv"
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens", *(f"2023-11-16 18:15:{at},5,4" for at in (46, 50, 50, 47.5))]
    file.write_text("\n".join(lines[:4]))
    assert [arrival.at_s for arrival in read_trace(file, in_order=True)] == [0, 4, 4]
    file.write_text("\n".join(lines))
    assert [arrival.at_s for arrival in read_trace(file)] == [0, 1.5, 4, 4]
    with pytest.raises(CannotRun, match=r"goes back in time: request 4 comes 2\.500 s before the one above it"):
        read_trace(file, in_order=True)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "x,y\n1,2\n"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,0,4\n2023-11-16 18:15:46,5,4\n"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,4\n"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1\n"),
        ("a.csv", ""),
        ("a.jsonl", "{"),
        ("a.jsonl", "5\n"),
        ("a.jsonl", '{"timestamp": 1}\n'),
        ("a.jsonl", '{"timestamp": 1, "input_length": 5, "output_length": 5, "hash_ids": []}\n'),  # only one
        ("a.jsonl", b"\xff\xfe"),
        ("a.jsonl", '{"timestamp": NaN, "input_length": 5, "output_length": 5, "hash_ids": []}\n' * 2),
    ],
)
def test_files_that_are_no_traces(tmp_path, name, text):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CannotRun) as error:
        read_trace(file)
    assert "\n" not in str(error.value)


def test_no_file():
    with pytest.raises(CannotRun, match="No such file"):
        read_trace("/nowhere/trace.csv")


ARRIVALS = st.lists(
    st.builds(Arrival, st.floats(0, 1000), st.integers(1, 10_000), st.integers(1, 10_000)), min_size=2, max_size=30
).map(lambda trace: sorted(trace, key=lambda arrival: arrival.at_s))


@given(ARRIVALS, st.floats(0.001, 3), st.integers(8, 4096))
def test_shrunk_requests_fit(trace, factor, most):
    small = shrink(trace, factor, most)
    assert len(small) == len(trace)
    for arrival in small:
        assert arrival.tokens_in >= 1 and arrival.tokens_out >= 2
        assert arrival.tokens_in + arrival.tokens_out <= most


@given(ARRIVALS, st.integers(2, 100), st.floats(0.01, 1000))
def test_the_rate_is_the_one_asked_for(trace, requests, rate):
    trace = [Arrival(a.at_s - trace[0].at_s, a.tokens_in, a.tokens_out) for a in trace]
    replayed = at_rate(trace, requests, rate)
    assert len(replayed) == requests and replayed[0].at_s == 0
    assert [a.tokens_in for a in replayed] == [trace[i % len(trace)].tokens_in for i in range(requests)]
    assert all(later.at_s >= earlier.at_s for earlier, later in itertools.pairwise(replayed))
    if replayed[-1].at_s:
        assert (requests - 1) / replayed[-1].at_s == pytest.approx(rate)


def test_bursts_stay_bursts():
    trace = [Arrival(at, 1, 2) for at in (0.0, 0.1, 10.0)]
    assert [a.at_s for a in at_rate(trace, 3, 2.0)] == pytest.approx([0, 0.01, 1.0])


def test_the_second_round_shares_nothing_with_the_first():
    trace = [Arrival(0.0, 600, 2, (1, 2)), Arrival(1.0, 600, 2, (1, 3))]
    first, second, third, _ = (set(a.blocks) for a in at_rate(trace, 4, 1.0))
    assert first & second and not first & third


def test_means():
    assert mean_lengths([Arrival(0, 10, 2), Arrival(1, 21, 4)]) == (15.5, 3)


def test_the_file_for_vllms_client(tmp_path):
    file = tmp_path / "t.jsonl"
    trace = [Arrival(0.0, 40, 3, (7, 8, 9)), Arrival(0.5, 33, 2, (7,)), Arrival(0.7, 20, 2)]
    write_timed_trace(trace, file, block_tokens=16)
    first, second, third = map(json.loads, file.read_text().splitlines())
    assert first == {"timestamp": 0.0, "input_length": 40, "output_length": 3, "hash_ids": ["7", "8", "9"]}
    assert len(second["hash_ids"]) == 3 and second["hash_ids"][0] == "7"  # enough blocks for its length
    assert len({*first["hash_ids"], *second["hash_ids"], *third["hash_ids"]}) == 3 + 2 + 2
