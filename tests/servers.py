"""The production server for tests and benchmarks, with shorthands to ask it."""

import sys
from pathlib import Path

import requests

from common.gpu import detect
from common.server import ServerProcess

ROOT = Path(__file__).resolve().parent.parent


class Server(ServerProcess):
    """`inference_serving.py --serve` (or another command) as a process; a context manager.

    Args:
        folder: where its log goes.
        flags: added to the command line.
        command: the program; default: the production server.
    """

    def __init__(self, folder: Path, *flags: str, command: tuple[str, ...] = (), env: dict | None = None) -> None:
        if not command:
            command = (sys.executable, str(ROOT / "ch16" / "inference_serving.py"), "--serve")
            if detect().device == "cuda":  # several of these share the GPU
                flags = ("--gpu-memory-utilization", "0.25", *flags)
        super().__init__((*command, *flags), folder, env)

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
