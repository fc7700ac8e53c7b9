"""Start a real server for tests and benchmarks, wait for it, stop it by its process id."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import requests

from common.gpu import detect

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 300


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`inference_serving.py --serve` (or another command) as a process; a context manager.

    Args:
        folder: where its log goes.
        flags: added to the command line.
        command: the program before `--port`; default: the production server.
    """

    def __init__(self, folder: Path, *flags: str, command: tuple[str, ...] = (), env: dict | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"server-{self.port}.log"
        if not command:
            command = (sys.executable, str(ROOT / "ch16" / "inference_serving.py"), "--serve")
            if detect().device == "cuda":  # several of these share the GPU
                flags = ("--gpu-memory-utilization", "0.25", *flags)
        self._command = [*command, "--port", str(self.port), *flags]
        self._env = {**os.environ, **(env or {})}
        self.process: subprocess.Popen | None = None

    def start(self) -> "Server":
        """Start the process without waiting for the model."""
        with open(self.log, "w") as log:
            # A session of its own: a Ctrl-C in the terminal does not reach it, stop() does.
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, cwd="/", env=self._env, start_new_session=True
            )
        return self

    def wait_ready(self, path: str = "/ready") -> "Server":
        """Return when GET `path` answers 200; RuntimeError with the end of the log if the process ends first."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
            try:
                if requests.get(self.url + path, timeout=5).status_code == 200:
                    return self
            except requests.RequestException:
                pass
            time.sleep(0.3)
        raise RuntimeError(f"the server was not ready after {START_TIMEOUT_S} s:\n{self.tail()}")

    def tail(self, lines: int = 30) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text().splitlines()[-lines:])

    def stop(self, sig: int = signal.SIGINT) -> int:
        """Send a signal, wait, and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode

    def __enter__(self) -> "Server":
        try:
            return self.start().wait_ready()
        except BaseException:
            if self.process:
                self.stop()
            raise

    def __exit__(self, *exc: object) -> None:
        self.stop()

    # ---- shorthands for tests ----

    def post(self, path: str, body: object = None, **kwargs: object) -> requests.Response:
        """POST JSON."""
        return requests.post(self.url + path, json=body, timeout=120, **kwargs)

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series on /metrics; 0.0 if it is not there."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        for line in requests.get(self.url + "/metrics", timeout=30).text.splitlines():
            series, _, value = line.rpartition(" ")
            found, _, found_labels = series.partition("{")
            if found == name and wanted <= set(found_labels.rstrip("}").split(",")):
                return float(value)
        return 0.0
