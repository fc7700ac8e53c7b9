from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.monitoring.client import Reply, most_at_once


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=20))
def test_the_most_at_once(requests):
    answers = [Reply(sent, sent + latency) for sent, latency in requests]
    in_flight = [sum(answer.sent <= second < answer.arrived for answer in answers) for second in range(30)]
    assert most_at_once(answers) == max(in_flight)
