"""The parts of HTTP that a proxy needs: hop-by-hop headers, ends of events, the beginning of a conversation."""

import asyncio
import json
from collections.abc import Callable, Collection, Iterable, Mapping

from aiohttp import web

# RFC 9110, 7.6.1; a `Connection` header names more of them.
HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"} | {
    f"proxy-{name}" for name in ("authenticate", "authorization", "connection")
}
# Streams of these paths end with `data: [DONE]`; other event streams have ends of their own.
ENDS_WITH_DONE = ("/generate", "/v1/completions", "/v1/chat/completions")
EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")
MAX_EVENT_BYTES = 1 << 20
PREFIX_CHARS = 256


def end_to_end(headers: Mapping[str, str], drop: Collection[str] = ()) -> Iterable[tuple[str, str]]:
    """The headers that go on to the next hop, without those named in `drop` (lower case)."""
    lists = [value for key, value in headers.items() if key.lower() == "connection"]
    named = {name.strip().lower() for name in ",".join(lists).split(",")}
    gone = HOP_BY_HOP | named | set(drop)
    return [(key, value) for key, value in headers.items() if key.lower() not in gone]


def prefix_of(body: bytes) -> str:
    """The beginning of a request's text, the same for all turns of a conversation; "" if it has no text.

    A chat: its messages up to the user's first. A completion: the first 256 characters (or tokens) of the prompt.
    """
    try:
        content = json.loads(body)
        if messages := content.get("messages"):
            first = next((i for i, message in enumerate(messages) if message.get("role") == "user"), 0)
            return json.dumps(messages[: first + 1])
        prompt = content.get("prompt") or ""
        return prompt[:PREFIX_CHARS] if isinstance(prompt, str) else json.dumps(prompt[:PREFIX_CHARS])
    except (ValueError, AttributeError, TypeError, RecursionError):
        return ""  # the replica reports what is wrong with it


class WholeEvents:
    """Cuts a server-sent event stream where events end, so that a client never sees half of one.

    finished: `data: [DONE]` came. failed: the replica reported an error in the stream.
    """

    def __init__(self) -> None:
        self.finished = self.failed = False
        self.rest = b""  # an event that has not ended

    def feed(self, chunk: bytes) -> bytes:
        """The events that are complete with this chunk."""
        if not self.rest and chunk.endswith(b"\n\n"):  # the usual case
            events = chunk
        else:
            data = self.rest + chunk
            end = max(data.rfind(mark) + len(mark) if mark in data else 0 for mark in EVENT_ENDS)
            if len(data) - end > MAX_EVENT_BYTES:
                end = len(data)  # longer than any token's event: pass it on
            events, self.rest = data[:end], data[end:]
        self.finished |= b"data: [DONE]" in events
        self.failed |= b'data: {"error"' in events
        return events


class PatientServer(web.Server):
    """aiohttp's server that closes connections without a first request within `request_s`."""

    def __init__(self, handler: Callable, request_s: float, **kwargs: object) -> None:
        super().__init__(handler, **kwargs)
        self._request_s = request_s
        self._silent: dict[asyncio.BaseProtocol, asyncio.TimerHandle] = {}

    def connection_made(self, handler: asyncio.BaseProtocol, transport: asyncio.Transport) -> None:
        """A client connects."""
        super().connection_made(handler, transport)
        self._silent[handler] = asyncio.get_running_loop().call_later(self._request_s, handler.force_close)

    def heard_from(self, handler: asyncio.BaseProtocol) -> None:
        """A request has come on this connection."""
        if timer := self._silent.pop(handler, None):
            timer.cancel()

    def connection_lost(self, handler: asyncio.BaseProtocol, exc: BaseException | None = None) -> None:
        """A client has left."""
        self.heard_from(handler)
        super().connection_lost(handler, exc)
