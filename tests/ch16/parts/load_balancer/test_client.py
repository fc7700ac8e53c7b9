import asyncio
import contextlib
from types import SimpleNamespace

from ch16.parts.load_balancer.client import ask

HEADERS = {"x-served-by": "a:1", "x-retries": "1"}


def counted(tokens):
    return b'data: {"choices": [{}], "usage": {"completion_tokens": %d}}\n\n' % tokens


STREAM = counted(1) + counted(11) + counted(12) + counted(12) + b"data: [DONE]\n\n"
FAILED = b'event: error\ndata: {"error": {"message": "it broke off"}}\n\n'


class Session:
    """Says these chunks, whatever is asked."""

    def __init__(self, chunks):
        self._chunks = chunks

    @contextlib.asynccontextmanager
    async def post(self, url, **kwargs):
        yield SimpleNamespace(status=200, headers=HEADERS, content=self)

    async def iter_any(self):
        for chunk in self._chunks:
            yield chunk


def answer_to(*chunks):
    return asyncio.run(ask(Session(chunks), "http://a:1", "x", {"max_tokens": 12}, 1.0))


def test_a_stream_is_read_the_same_wherever_it_is_cut():
    for cut in range(1, len(STREAM)):
        seen = answer_to(STREAM[:cut], STREAM[cut:])
        assert seen.counts == [1, 11, 12] and len(seen.times) == 3
        assert seen.complete and not seen.told and seen.outcome == "answered"
        assert (seen.server, seen.retries) == ("a:1", 1)


def test_an_error_is_seen_wherever_it_is_cut():
    for cut in range(1, len(FAILED)):
        seen = answer_to(counted(1), FAILED[:cut], FAILED[cut:])
        assert seen.counts == [1] and seen.outcome == "cut off, told"


def test_half_an_event_is_none():
    seen = answer_to(counted(1) + counted(12)[:-5])
    assert seen.counts == [1] and seen.outcome == "cut off, not told"
