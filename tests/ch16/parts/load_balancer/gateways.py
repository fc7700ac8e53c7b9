"""The gateway as a process for tests, and ways to ask it."""

import contextlib
import json
import socket
import sys
import time

import requests

from common.server import ServerProcess
from common.standin import standin_command
from tests.servers import ROOT

SCRIPT = str(ROOT / "ch16" / "load_balancer.py")
BODY = {"model": "m", "prompt": "Once upon a time", "max_tokens": 5}


@contextlib.contextmanager
def gateway_for(folder, *servers, flags=(), env=None):
    addresses = ",".join(server.address for server in servers)
    command = [sys.executable, SCRIPT, "--servers", addresses, "--policy", "round-robin", *flags]
    with ServerProcess(command, folder, env) as gateway:
        yield gateway
        assert "Traceback" not in gateway.log.read_text()


@contextlib.contextmanager
def two_standins(folder, *flags):
    servers = [ServerProcess(standin_command(*flags), folder) for _ in range(2)]
    with contextlib.ExitStack() as running:
        for server in servers:
            server.start()
            running.callback(server.stop)
        for server in servers:
            server.wait_ready()
        yield servers


def post(gateway, path="/v1/completions", body=None, **kwargs):
    return requests.post(gateway.url + path, json=body or BODY, timeout=30, **kwargs)


def raw(gateway, data, hang_up=False):
    """Everything that comes back on a connection that sends these bytes."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as connection:
        connection.sendall(data)
        if hang_up:
            return b""
        parts = []
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                parts.append(part)
        return b"".join(parts)


def request_bytes(body=BODY, close=True, path="/v1/completions"):
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n"
    return head.encode() + (b"connection: close\r\n" if close else b"") + b"\r\n" + content


def metric(gateway, name):
    lines = requests.get(gateway.url + "/metrics", timeout=10).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
