"""ASGI in small pieces: headers, bodies that are read twice, whole JSON answers."""

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping

Scope = dict
Message = dict
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def header(scope: Scope, name: bytes) -> str:
    """A request header's value, or an empty string. Names are lower-case, as ASGI has them."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body already read, then whatever else comes (the disconnect)."""
    pending: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive_again() -> Message:
        return next(pending, None) or await receive()

    return receive_again


def redirect(scope: Scope, path: str, length: int) -> Scope:
    """The same request at another path, with a body of another length."""
    headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
    headers.append((b"content-length", str(length).encode()))
    return {**scope, "path": path, "raw_path": path.encode(), "headers": headers}


async def send_json(send: Send, status: int, content: object, headers: Mapping[str, str] | None = None) -> None:
    """A whole JSON answer."""
    body = json.dumps(content).encode()
    fields = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    encoded = [(key.encode(), value.encode()) for key, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
