"""The HTTP under monitoring.py: a thread per request, JSON in, and a port that is free."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ch16.parts.monitoring.engine import SharedEngine
from common.metrics import Rate


class Handler(BaseHTTPRequestHandler):
    """One HTTP request; `do_GET` and `do_POST` of a subclass answer it."""

    server: "Server"

    def read_json(self) -> dict[str, object]:
        """The body of the request."""
        return json.loads(self.rfile.read(int(self.headers["content-length"])))

    def answer(self, status: int, body: bytes) -> None:
        """Send a status and a body."""
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Print nothing."""


class Server(ThreadingHTTPServer):
    """`engine` generates for all requests; `rate` is its tokens/s over the last `window_s`."""

    request_queue_size = 1024  # connections that wait to be accepted

    def __init__(self, handler: type[Handler], engine: SharedEngine, window_s: float) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.engine, self.rate = engine, Rate(window_s)


@contextlib.contextmanager
def serving(handler: type[Handler], engine: SharedEngine, window_s: float) -> Iterator[str]:
    """A server while the block runs, by its URL."""
    with Server(handler, engine, window_s) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
