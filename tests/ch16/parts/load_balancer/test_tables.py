import pytest

from ch16.parts.load_balancer.client import StreamedAnswer
from ch16.parts.load_balancer.lab import Fault
from ch16.parts.load_balancer.tables import claim, fault_rows, outcome_rows


def answer(counts, wanted=3, complete=True, told=False, sent=0.0, server="a:1", retries=0):
    times = [sent + 0.1 * (i + 1) for i in range(len(counts))]
    return StreamedAnswer("x", sent, counts, times, wanted, 200, complete, told, sent + 0.5, server, retries)


@pytest.mark.parametrize(
    ("seen", "outcome"),
    [
        (answer([1, 2, 3]), "answered"),
        (answer([2, 3]), "answered"),  # two tokens in one event
        (answer([1, 2], complete=False, told=True), "cut off, told"),
        (answer([1, 2], complete=False), "cut off, not told"),
        (answer([1, 2]), "cut off, not told"),  # a clean end, but tokens are missing
        (answer([], complete=False), "lost"),
        (answer([], complete=False, told=True), "lost"),
        (answer([1, 2, 1, 2, 3]), "duplicated"),
        (answer([1, 2, 3, 4]), "duplicated"),
    ],
)
def test_outcomes(seen, outcome):
    assert seen.outcome == outcome


def test_rows_and_claim():
    good, moved = answer([1, 2, 3]), answer([1, 2, 3], sent=2.0, retries=1)
    cut, lost = answer([1], complete=False, told=True, sent=1.8), answer([], complete=False, sent=2.0)
    back = answer([1, 2, 3], sent=5.25, server="b:2")
    before = answer([1, 2, 3], sent=4.9, server="b:2")
    answers = {
        "one server": [good, lost],
        "plain round robin": [good, lost, lost],
        "gateway": [good, moved, cut, before, back],
    }
    rows = outcome_rows(answers)
    assert [row["lost"] for row in rows] == [1, 2, 0]
    assert (rows[2]["answered"], rows[2]["retried"], rows[2]["cut off, told"], rows[2]["sent"]) == (4, 1, 1, 5)
    assert rows[2]["ttft_p50_ms"] == pytest.approx(100)
    (fault,) = fault_rows(answers["gateway"], [Fault("SIGKILL", "b:2", 2.0, 5.0)])
    assert (fault["retried"], fault["cut off, told"], fault["lost"]) == (1, 1, 0)
    assert fault["away_s"] == pytest.approx(3) and fault["back_s"] == pytest.approx(0.25)
    assert claim(rows, [fault]).verdict == "holds"
    assert "1 of 2 with one server" in claim(rows, [fault]).measured


def test_the_claim_fails_if_anything_is_lost_or_twice():
    good, lost = answer([1, 2, 3]), answer([], complete=False)
    twice = answer([1, 2, 1, 2, 3])
    for bad in (lost, twice, answer([1], complete=False)):
        rows = outcome_rows({"one server": [lost], "plain round robin": [lost, lost], "gateway": [good, bad]})
        assert claim(rows, []).verdict == "fails"


def test_the_claim_says_which_replicas_came_back():
    good, lost = answer([1, 2, 3]), answer([], complete=False)
    rows = outcome_rows({"one server": [lost], "plain round robin": [lost, lost], "gateway": [good]})
    some = claim(rows, [{"back_s": 0.24}, {"back_s": None}, {"back_s": 1.16}]).measured
    assert some.endswith("; returned replicas in use after 1.2 s at most; 1 of 3 replicas not used again")
    none = claim(rows, [{"back_s": None}]).measured
    assert none.endswith("were told; 1 of 1 replicas not used again") and "inf" not in none
    assert claim(rows, [{"back_s": 0.5}]).measured.endswith("after 0.5 s at most")


def test_a_server_that_was_never_used_again():
    (fault,) = fault_rows([answer([1, 2, 3])], [Fault("SIGKILL", "b:2", 0.0, 0.2)])
    assert fault["back_s"] is None
