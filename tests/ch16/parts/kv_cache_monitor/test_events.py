"""Event streams against a publisher of the same wire format, which loses what it is told to."""

import threading
import time
from types import SimpleNamespace

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from ch16.parts.kv_cache_monitor.events import Cleared, EventStream, Removed, Stored, parse
from common.cli import CannotRun


def batch(*events):
    return msgspec.msgpack.encode([0.0, list(events), 0])


def stored(*hashes, **more):
    return {"type": "BlockStored", "block_hashes": list(hashes), "block_size": 16, "medium": "GPU"} | more


@pytest.fixture
def publisher(tmp_path):
    """`send(number, payload)` publishes; `keep` are the batches that a replay request gets, in vLLM's frames."""
    context = zmq.Context.instance()
    events, replay = f"ipc://{tmp_path}/e", f"ipc://{tmp_path}/r"
    pub, router = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
    pub.bind(events)
    router.bind(replay)
    keep, stop, asked = [], threading.Event(), []

    def answer():
        while not stop.is_set():
            if router.poll(20):
                client, _, start = router.recv_multipart()
                asked.append(int.from_bytes(start, "big"))
                for number, payload in keep:
                    if number >= asked[-1]:
                        router.send_multipart((client, b"", b"kv", number.to_bytes(8, "big"), payload))
                router.send_multipart((client, b"", b"", (-1).to_bytes(8, "big", signed=True), b""))

    thread = threading.Thread(target=answer)
    thread.start()

    def send(number, payload, topic=b"kv"):
        pub.send_multipart((topic, number.to_bytes(8, "big"), payload))

    yield SimpleNamespace(send=send, keep=keep, events=events, replay=replay, asked=asked)
    stop.set()
    thread.join()
    pub.close(linger=0)
    router.close(linger=0)


def subscribed(publisher, replay=True):
    stream = EventStream(publisher.events, publisher.replay if replay else None)
    while not list(stream.poll(0.02)):  # subscriptions take a moment: number 0 until it arrives
        publisher.send(0, batch(stored(0)))
    time.sleep(0.05)
    while stream._socket.poll(20):  # more than one of them may have come
        stream._socket.recv_multipart()
    return stream


def collect(stream, count):
    found = []
    for _ in range(20):  # a poll may bring only what came before
        found += stream.poll(0.5)
        if len(found) >= count:
            return found
    raise AssertionError(f"only {found}")


def test_events_of_every_kind():
    events = parse(
        batch(
            stored(1, 2),
            {"type": "BlockRemoved", "block_hashes": [b"x"], "medium": "GPU"},
            {"type": "AllBlocksCleared"},
            stored(9, medium="CPU"),  # offloaded: another place
            {"type": "SomethingNew"},
        )
    )
    assert events == [Stored((1, 2)), Removed((b"x",)), Cleared()]


@given(st.binary(max_size=40))
def test_anything_else_is_one_clear_error(payload):
    try:
        parse(payload)
    except ValueError as error:
        assert "not a batch of KV cache events" in str(error)


def test_in_order(publisher):
    stream = subscribed(publisher)
    for number in range(1, 6):
        publisher.send(number, batch(stored(number)))
    assert [event.hashes for event in collect(stream, 5)] == [(n,) for n in range(1, 6)]
    assert (stream.lost, stream.replayed) == (0, 0)
    stream.close()


def test_lost_batches_are_asked_for_again(publisher):
    stream = subscribed(publisher)
    publisher.keep += [(n, batch(stored(n))) for n in range(5)]
    publisher.send(4, batch(stored(4)))  # 1, 2 and 3 never came
    assert [event.hashes for event in collect(stream, 4)] == [(1,), (2,), (3,), (4,)]
    assert (stream.lost, stream.replayed) == (0, 3) and publisher.asked == [1]
    stream.close()


def test_what_cannot_be_replayed_is_counted(publisher):
    stream = subscribed(publisher)
    publisher.keep += [(3, batch(stored(3))), (4, batch(stored(4)))]  # 1 and 2 were dropped
    publisher.send(4, batch(stored(4)))
    assert [event.hashes for event in collect(stream, 2)] == [(3,), (4,)]
    assert (stream.lost, stream.replayed) == (2, 1)
    stream.close()


def test_without_replay_the_loss_is_reported(publisher):
    stream = subscribed(publisher, replay=False)
    publisher.send(3, batch(stored(3)))
    assert [event.hashes for event in collect(stream, 1)] == [(3,)] and stream.lost == 2
    stream.close()


def test_a_late_subscriber_catches_up(publisher):
    stream = EventStream(publisher.events, publisher.replay)
    publisher.keep += [(n, batch(stored(n))) for n in range(3)]
    assert [event.hashes for event in stream.catch_up()] == [(0,), (1,), (2,)]
    assert list(stream.catch_up()) == [] and stream.lost == 0
    stream.close()


def test_a_batch_that_came_with_a_replay_does_not_count_twice(publisher):
    stream = subscribed(publisher)
    publisher.keep += [(n, batch(stored(n))) for n in range(3)]
    assert [event.hashes for event in stream.catch_up()] == [(1,), (2,)]
    publisher.send(2, batch(stored(2)))
    publisher.send(3, batch(stored(3)))
    assert [event.hashes for event in collect(stream, 1)] == [(3,)]
    stream.close()


def test_an_engine_that_started_anew_is_noticed(publisher):
    stream = subscribed(publisher)
    publisher.send(1, batch(stored(1)))
    publisher.send(0, batch(stored(7)))
    with pytest.raises(CannotRun, match="start over at batch 0"):
        collect(stream, 2)
    stream.close()


@pytest.mark.parametrize("payload", [b"\xa2ab", b"\x92\x00\x91\x00", b"", b"\x90"])
def test_payloads_that_are_no_batch(payload):
    with pytest.raises(ValueError, match="not a batch of KV cache events"):
        parse(payload)


@pytest.mark.slow
def test_vllms_own_publisher(tmp_path):
    """What it publishes before a subscription comes back by its replay."""
    from vllm.distributed.kv_events import AllBlocksCleared, KVEventBatch, ZmqEventPublisher

    address, replay = f"ipc://{tmp_path}/e", f"ipc://{tmp_path}/r"
    publisher = ZmqEventPublisher(0, endpoint=address, replay_endpoint=replay, topic="kv")
    for _ in range(3):
        publisher.publish(KVEventBatch(ts=0.0, events=[AllBlocksCleared()]))
    stream, found = EventStream(address, replay, topic="kv"), []
    while len(found) < 3:
        found += stream.catch_up()
    assert found == [Cleared()] * 3 and (stream.lost, stream.replayed) == (0, 3)
    stream.close()
    publisher.shutdown()


def test_rubbish_and_bad_addresses(publisher):
    stream = subscribed(publisher)
    publisher.send(1, b"rubbish")
    with pytest.raises(CannotRun, match="not a batch of KV cache events"):
        collect(stream, 1)
    stream.close()
    with pytest.raises(CannotRun, match="cannot subscribe to 'nonsense'"):
        EventStream("nonsense")


@settings(max_examples=30)
@given(st.sets(st.integers(1, 12)), st.integers(0, 12))
def test_whatever_is_lost_either_comes_back_or_is_counted(missing, kept_from):
    """Without sockets: batches given to the stream directly, the replay from a list."""
    stream = EventStream.__new__(EventStream)
    stream.lost = stream.replayed = 0
    stream._last = -1
    stream._next, kept = 0, [(n, batch(stored(n))) for n in range(kept_from, 14)]

    def replay(end, timeout_s=1.0):
        for number, payload in kept:
            if stream._next <= number < end:
                stream.lost += number - stream._next
                stream._next = number + 1
                stream.replayed += 1
                yield from parse(payload)

    stream._replay_until = replay
    seen = [e.hashes[0] for n in range(14) if n not in missing for e in stream._batch(n, batch(stored(n)))]
    assert seen == sorted(set(seen)) and len(seen) + stream.lost == 14
    assert set(range(14)) - missing <= set(seen)
