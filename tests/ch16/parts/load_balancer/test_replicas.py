"""The gateway in front of replicas that hang, drain and come back, and its own end."""

import os
import signal
import threading

import pytest
import requests

from tests.ch16.parts.load_balancer.gateways import (
    BODY,
    gateway_for,
    metric,
    post,
    raw,
    request_bytes,
    two_standins,
    wait_for,
)


@pytest.fixture
def replicas(tmp_path):
    with two_standins(tmp_path, "--step-ms", "20") as servers:
        yield servers


def streams(gateway, count, tokens):
    """Threads that read a stream each; what they saw."""
    seen = [b""] * count

    def read(i):
        seen[i] = raw(gateway, request_bytes({**BODY, "stream": True, "max_tokens": tokens}))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    return threads, seen


def test_a_hung_replica_loses_what_it_has_not_begun(replicas, tmp_path):
    hung, well = replicas
    with gateway_for(tmp_path, *replicas) as gateway:
        hung.signal_all(signal.SIGSTOP)
        threads, seen = streams(gateway, 6, 3)  # before the checks have noticed
        for thread in threads:
            thread.join()
        assert all(answer.rstrip().endswith(b"data: [DONE]\n\n\r\n0") for answer in seen)
        assert all(f"x-served-by: {well.address}".encode() in answer.lower() for answer in seen)
        assert metric(gateway, "gateway_retries_total") >= 3
        hung.signal_all(signal.SIGCONT)
        wait_for(lambda: post(gateway).headers["x-served-by"] == hung.address)


def test_a_drained_replica_finishes_and_gets_nothing_new(replicas, tmp_path):
    leaving, staying = replicas
    with gateway_for(tmp_path, *replicas) as gateway:
        threads, seen = streams(gateway, 4, 60)
        wait_for(lambda: metric(gateway, f'gateway_in_flight{{server="{leaving.address}"}}') == 2)
        wait_for(lambda: metric(gateway, "gateway_first_byte_seconds_count") == 4)
        leaving.process.send_signal(signal.SIGTERM)
        answers = [post(gateway, body={**BODY, "max_tokens": 1}) for _ in range(6)]
        assert {answer.headers["x-served-by"] for answer in answers} == {staying.address}
        for thread in threads:
            thread.join()
        assert all(b"data: [DONE]" in answer and b"event: error" not in answer for answer in seen)
        assert leaving.process.wait(20) == 0


def test_the_gateway_drains_itself(replicas, tmp_path):
    with gateway_for(tmp_path, *replicas) as gateway:
        threads, seen = streams(gateway, 2, 60)
        wait_for(lambda: metric(gateway, "gateway_first_byte_seconds_count") == 2)
        gateway.process.send_signal(signal.SIGTERM)
        wait_for(lambda: requests.get(gateway.url + "/ready", timeout=10).status_code == 503)
        assert metric(gateway, "gateway_draining") == 1
        answer = post(gateway)
        assert answer.status_code == 503 and "draining" in answer.text
        for thread in threads:
            thread.join()
        assert all(b"data: [DONE]" in answer for answer in seen)
        assert gateway.process.wait(20) == 0


def test_ctrl_c_ends_it_at_once(replicas, tmp_path):
    with gateway_for(tmp_path, *replicas) as gateway:
        threads, _ = streams(gateway, 1, 1000)
        wait_for(lambda: metric(gateway, "gateway_first_byte_seconds_count") == 1)
        os.kill(gateway.process.pid, signal.SIGINT)
        assert gateway.process.wait(10) == 0
        threads[0].join()
