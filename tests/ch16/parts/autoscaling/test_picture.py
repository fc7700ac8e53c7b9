import pytest

from ch16.parts.autoscaling.picture import message


@pytest.mark.parametrize(
    ("ratios", "text"),
    [
        ({"gpu": 1.01, "active": 1234.0}, "GPU utilization reads 1.01x its value at 1x, requests in flight 1,234x"),
        ({"queue": None, "kv": 1.0}, "What each signal reads under overload"),
    ],
)
def test_the_message_is_computed(ratios, text):
    assert text in message(ratios)
