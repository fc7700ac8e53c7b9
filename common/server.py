"""Servers as processes: take a port, start one, wait until it answers, signal it with all it has started."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import requests

from common.cli import CannotRun

START_TIMEOUT_S = 900


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, not yet listening; CannotRun if the port is taken or not ours to take."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise CannotRun(f"cannot listen on {host}:{port}: {reason}; choose another --port") from None
    return listener


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ServerProcess:
    """A server on 127.0.0.1 as a process of its own; a context manager. It can be started again on the same port.

    `--port N` is added to `command`, `env` to the environment; the log goes to `folder`.
    """

    def __init__(self, command: Sequence[str], folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.address}"
        self.log = folder / f"server-{self.port}.log"
        self._command = [*command, "--port", str(self.port)]
        self._env = {**os.environ, **(env or {})}
        self.process: subprocess.Popen | None = None

    def start(self) -> "ServerProcess":
        """Start the process without waiting for an answer."""
        with open(self.log, "a") as log:
            # A session of its own: a Ctrl-C in the terminal does not reach it, stop() does.
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, cwd="/", env=self._env, start_new_session=True
            )
        return self

    def wait_ready(self, path: str = "/ready") -> "ServerProcess":
        """Return when GET `path` answers 200; CannotRun, with the end of its log, if the process ended or is late."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if (status := self.process.poll()) is not None:
                raise CannotRun(f"the server on port {self.port} ended with status {status}: {self.tail(1)}")
            with contextlib.suppress(requests.RequestException):
                if requests.get(self.url + path, timeout=5).status_code == 200:
                    return self
            time.sleep(0.1)
        raise CannotRun(f"the server on port {self.port} was not ready after {START_TIMEOUT_S} s: {self.tail(1)}")

    def tail(self, lines: int = 30) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text().splitlines()[-lines:])

    def signal_all(self, sig: int) -> None:
        """Send a signal to the process and all that it has started, as when a machine dies (SIGKILL) or hangs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, sig)

    def stop(self, sig: int = signal.SIGINT, timeout_s: float = 60) -> int:
        """Send a signal to the process, wait, and return the exit status; after `timeout_s`, SIGKILL."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
        self.signal_all(signal.SIGKILL)  # what it left behind, too
        return self.process.wait()

    def __enter__(self) -> "ServerProcess":
        try:
            return self.start().wait_ready()
        except BaseException:
            if self.process:
                self.stop()
            raise

    def __exit__(self, *exc: object) -> None:
        self.stop()
