import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.inference_serving import bodies
from ch16.parts.inference_serving.bodies import GenerateEvents, Refused


@given(st.dictionaries(st.text(max_size=5), st.integers(-(2**63), 2**63 - 1) | st.text() | st.booleans(), max_size=5))
def test_valid_bodies_come_back_unchanged(content):
    assert bodies.parse_body(json.dumps(content).encode()) == content


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 9223372036854775808}',
        b"[" * 100_000,
        b'{"a": 1e400}',
        b'{"a": [-1e400]}',
        b'{"a": 1' + b"0" * 400 + b".0}",
        b'{"a": -9223372036854775809}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": "\\ud800"}',
        b'{"a": "\xff"}',
    ],
)
def test_bodies_no_engine_can_hold(body):
    with pytest.raises(Refused) as refusal:
        bodies.parse_body(body)
    assert refusal.value.status == 400 and "\n" not in str(refusal.value)


def test_fractions_come_back_unchanged():
    assert bodies.parse_body(b'{"a": [0.1, -1e308, 1e-400]}') == {"a": [0.1, -1e308, 0.0]}


def test_surrogate_pairs_are_text():
    assert bodies.parse_body(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


@pytest.mark.parametrize(
    ("content", "places"),
    [
        ({"prompt": "a"}, 1),
        ({"prompt": ["a", "b"]}, 2),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1], [2]]}, 2),
        ({"prompt": ["a", "b"], "n": 3}, 6),
        ({"messages": [], "n": 4}, 4),
        ({"prompt": "a", "n": None}, 1),
        ({"prompt": "a", "n": -5}, 1),
        ({"prompt": []}, 1),
        ({"messages": [[{}], [{}]], "n": 2}, 4),
    ],
)
def test_places_are_sequences(content, places):
    assert bodies.sequences(content) == places


@pytest.mark.parametrize("n", ["8", 2.0, True, [1]])
def test_n_that_vllm_would_convert_is_refused(n):
    with pytest.raises(Refused):
        bodies.sequences({"prompt": "a", "n": n})


@pytest.mark.parametrize(
    ("content", "length"),
    [
        ({"prompt": "abc"}, 3),
        ({"prompt": ["ab", "c"]}, 3),
        ({"prompt": [5, 6]}, 2),
        ({}, 0),
        ({"prompt": None}, 0),
        ({"messages": [{"role": "user", "content": "hello"}]}, 9),
        ({"messages": [{"role": "u", "content": [{"type": "text", "text": "hi"}]}]}, 7),
    ],
)
def test_prompt_length(content, length):
    assert bodies.prompt_chars(content) == length


# ---- the events of /generate ----

CHUNKS = [
    {"choices": [{"text": "he", "finish_reason": None}]},
    {"choices": [{"text": "llo\n\n", "finish_reason": "stop"}]},
    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}},
]
STREAM = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in CHUNKS) + b"data: [DONE]\n\n"


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_events_may_be_cut_anywhere(cuts):
    edges = [0, *sorted(cuts), len(STREAM)]
    events = GenerateEvents()
    output = b"".join(events.feed(STREAM[a:b]) for a, b in itertools.pairwise(edges))
    lines = [line.removeprefix(b"data: ") for line in output.split(b"\n\n") if line]
    assert lines.pop() == b"[DONE]"
    assert [json.loads(line) for line in lines] == [
        {"text": "he"},
        {"text": "llo\n\n"},
        {"text": "", "finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 2},
    ]


def test_an_error_in_mid_stream_is_passed_on():
    event = b'data: {"error": {"message": "gone"}}\n\n'
    assert GenerateEvents().feed(event) == event
