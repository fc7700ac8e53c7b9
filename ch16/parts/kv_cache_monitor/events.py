"""vLLM's KV cache events over ZMQ: blocks stored, removed, all cleared; in order, and no loss goes unnoticed.

A batch has three frames: topic, sequence number (8 bytes, big endian), and msgpack [time, events, rank]. Numbers count
from 0 without gaps. A gap means lost batches (a slow reader, a late subscription). The publisher keeps recent batches:
its replay socket takes a first number and sends them again, ending with number -1. vLLM's
`vllm/distributed/kv_events.py` describes the format.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import zmq

from common.cli import CannotRun

END_OF_REPLAY = -1


@dataclass(frozen=True)
class Stored:
    """Blocks whose content can now be reused from the prefix cache: a hash per block."""

    hashes: tuple[int | bytes, ...]


@dataclass(frozen=True)
class Removed:
    """Blocks whose content was evicted."""

    hashes: tuple[int | bytes, ...]


@dataclass(frozen=True)
class Cleared:
    """The whole prefix cache was reset."""


Event = Stored | Removed | Cleared


def parse(payload: bytes) -> list[Event]:
    """The events of one batch about GPU blocks; unknown kinds are skipped. ValueError: this is no batch of events."""
    try:
        _, events, *_ = msgspec.msgpack.decode(payload)
        return [event for raw in events if (event := _event(raw)) is not None]
    except (msgspec.DecodeError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"not a batch of KV cache events: {error}") from None


def _event(raw: dict) -> Event | None:
    if raw.get("medium") not in (None, "GPU"):
        return None
    if raw["type"] == "BlockStored":
        return Stored(tuple(raw["block_hashes"]))
    if raw["type"] == "BlockRemoved":
        return Removed(tuple(raw["block_hashes"]))
    return Cleared() if raw["type"] == "AllBlocksCleared" else None


class EventStream:
    """Events of one engine under a topic, in order. Without a replay endpoint, lost batches stay lost."""

    def __init__(self, endpoint: str, replay_endpoint: str | None = None, topic: str = "") -> None:
        self.lost = self.replayed = 0  # batches that could not be replayed, and those that were
        self._next = 0  # the sequence number that should come next
        self._last = -1  # the number that came last, replays aside
        self._replay_endpoint = replay_endpoint
        self._context = zmq.Context.instance()
        self._socket = self._context.socket(zmq.SUB)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._socket.close(linger=0)
            raise CannotRun(f"cannot subscribe to '{endpoint}': {error}") from None
        self._socket.setsockopt_string(zmq.SUBSCRIBE, topic)

    def close(self) -> None:
        """Unsubscribe."""
        self._socket.close(linger=0)

    def poll(self, timeout_s: float = 0.0) -> Iterator[Event]:
        """Events that have arrived; waits for the first at most `timeout_s`. CannotRun: the engine was restarted."""
        wait_ms = int(1000 * timeout_s)
        while self._socket.poll(wait_ms):
            wait_ms = 0
            frames = self._socket.recv_multipart()
            if len(frames) < 2:
                raise CannotRun("not a batch of KV cache events: a message of one frame")
            yield from self._batch(int.from_bytes(frames[-2], "big", signed=True), frames[-1])

    def catch_up(self, timeout_s: float = 1.0) -> Iterator[Event]:
        """Request all batches that did not arrive: published before the subscription, or lost at the end."""
        return self._replay_until(None, timeout_s)

    def _batch(self, number: int, payload: bytes) -> Iterator[Event]:
        if number <= self._last:
            raise CannotRun(f"KV cache events start over at batch {number}: the engine was restarted")
        self._last = number
        if number > self._next:
            yield from self._replay_until(number)
            self.lost += number - self._next
        if number >= self._next:  # otherwise it has come with a replay
            self._next = number + 1
            yield from _parsed(payload)

    def _replay_until(self, end: int | None, timeout_s: float = 1.0) -> Iterator[Event]:
        """Batches from the next one on, before `end`; batches that the publisher has dropped stay missing."""
        if self._replay_endpoint is None:
            return
        with self._context.socket(zmq.DEALER) as socket:  # a REQ socket would take one answer only
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self._replay_endpoint)
            socket.send_multipart((b"", self._next.to_bytes(8, "big")))
            while socket.poll(int(1000 * timeout_s)):
                _, _, number_bytes, payload = socket.recv_multipart()  # an empty frame and the topic come first
                number = int.from_bytes(number_bytes, "big", signed=True)
                if number == END_OF_REPLAY:
                    return
                if end is not None and number >= end:
                    continue  # it arrives without a replay
                if number >= self._next:
                    self.lost += number - self._next  # older than what the publisher keeps
                    self._next = number + 1
                    self.replayed += 1
                    yield from _parsed(payload)


def _parsed(payload: bytes) -> Sequence[Event]:
    try:
        return parse(payload)
    except ValueError as error:
        raise CannotRun(str(error)) from None
