"""Requests into an engine step by step, on one that counts."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ch16.continuous_batching import continuous, fixed_batches
from ch16.parts.continuous_batching.drive import all_at_once, drive, random_requests

lengths_and_slots = {"lengths": st.lists(st.integers(1, 12), min_size=1, max_size=30), "slots": st.integers(1, 6)}
shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_all_at_once(counting_llm):
    llm = counting_llm()
    course = drive(llm, all_at_once(random_requests(4, [3, 1, 2], vocab_size=100, seed=0)))
    assert [len(course.arrived[name]) for name in "012"] == [3, 1, 2] and course.running == 0
    assert [count for _, count in course.steps] == [3, 2, 1] and llm.running == [3, 2, 1]
    assert max(course.sent.values()) <= min(course.arrived["1"])
    assert all(list(times) == sorted(times) for times in course.arrived.values())


def test_nothing_due_is_nothing_done(counting_llm):
    assert drive(counting_llm(), lambda course: []).steps == []


@shared
@given(**lengths_and_slots)
def test_fixed_batches_start_when_the_slowest_is_done(counting_llm, lengths, slots):
    llm = counting_llm()
    course = drive(llm, fixed_batches(random_requests(2, lengths, 100, 0), slots))
    expected = [
        sum(n > step for n in lengths[i : i + slots])
        for i in range(0, len(lengths), slots)
        for step in range(max(lengths[i : i + slots]))
    ]
    assert llm.running == expected
    assert [len(tokens) for tokens in course.arrived.values()] == lengths


@shared
@given(**lengths_and_slots)
def test_continuous_leaves_no_slot_free_while_a_request_waits(counting_llm, lengths, slots):
    llm = counting_llm()
    course = drive(llm, continuous(random_requests(2, lengths, 100, 0), slots))
    waiting, left = list(lengths), []
    for running in llm.running:  # the same by a plain list of what each running request has left
        while waiting and len(left) < slots:
            left.append(waiting.pop(0))
        assert running == len(left) and (running == slots or not waiting)
        left = [n - 1 for n in left if n > 1]
    assert not waiting and not left
    assert [len(tokens) for tokens in course.arrived.values()] == lengths
    assert list(course.sent) == list(map(str, range(len(lengths))))  # in order
