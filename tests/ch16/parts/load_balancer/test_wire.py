import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from ch16.parts.load_balancer.wire import MAX_EVENT_BYTES, WholeEvents, end_to_end, prefix_of


def test_hop_by_hop_headers_end_here():
    headers = CIMultiDict(
        [
            ("Connection", "close, X-Only-Here"),
            ("Connection", "x-this-too"),
            ("X-Only-Here", "1"),
            ("X-THIS-TOO", "1"),
            ("Transfer-Encoding", "chunked"),
            ("TE", "trailers"),
            ("Upgrade", "h2c"),
            ("Keep-Alive", "5"),
            ("Proxy-Authorization", "x"),
            ("Accept", "a"),
            ("Cookie", "b"),
            ("Cookie", "c"),
            ("Host", "h"),
        ]
    )
    assert list(end_to_end(headers, ("host",))) == [("Accept", "a"), ("Cookie", "b"), ("Cookie", "c")]


def chat(*contents):
    roles = ("system", *("user", "assistant") * len(contents))
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}).encode()


def test_all_turns_of_a_conversation_have_one_prefix():
    first = prefix_of(chat("be brief", "hello"))
    assert first and prefix_of(chat("be brief", "hello", "hi", "and now?")) == first
    assert prefix_of(chat("be brief", "another")) != first
    assert prefix_of(chat("be long", "hello")) != first


@pytest.mark.parametrize(
    ("body", "prefix"),
    [
        (b'{"prompt": "abc"}', "abc"),
        (json.dumps({"prompt": "x" * 1000}).encode(), "x" * 256),
        (b'{"prompt": [1, 2, 3]}', "[1, 2, 3]"),
        (b'{"messages": [{"role": "system", "content": "a"}]}', '[{"role": "system", "content": "a"}]'),
        (b"", ""),
        (b"{", ""),
        (b"\xff", ""),
        (b"[]", ""),
        (b'{"messages": "text"}', ""),
        (b'{"messages": 5}', ""),
        (b'{"prompt": 5}', ""),
        (b"[" * 100_000, ""),
    ],
)
def test_prefixes_of_anything(body, prefix):
    assert prefix_of(body) == prefix


@given(st.lists(st.sampled_from([b"data: a", b"data: [DONE]", b": note", b"event: x\ndata: b"])), st.data())
def test_only_whole_events_pass_and_all_of_them(events, data):
    end = data.draw(st.sampled_from([b"\n\n", b"\r\n\r\n"]))
    stream = b"".join(event + end for event in events) + b"data: ha"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    whole, out = WholeEvents(), b""
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        out += whole.feed(stream[start:stop])
        assert not out or out.endswith((b"\n\n", b"\r\n\r\n"))
    assert out + whole.rest == stream and whole.rest == b"data: ha"
    assert whole.finished == (b"data: [DONE]" in events) and not whole.failed


def test_an_error_in_the_stream_is_seen():
    whole = WholeEvents()
    whole.feed(b'data: {"error": {"message": "the engine died"}}\n\ndata: [DONE]\n\n')
    assert whole.failed and whole.finished


def test_what_never_ends_is_not_held_for_ever():
    whole, passed = WholeEvents(), b""
    for _ in range(40):
        passed += whole.feed(b"x" * 100_000)
        assert len(whole.rest) <= MAX_EVENT_BYTES
    assert len(passed) + len(whole.rest) == 4_000_000
