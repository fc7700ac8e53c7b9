"""What is under monitoring.py: a vLLM engine for a server with a thread per request, and that server's HTTP."""

import contextlib
import itertools
import json
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from common.cli import CannotRun
from common.load import SteppedEngine, exactly
from common.metrics import Rate

if TYPE_CHECKING:
    from vllm import LLM


class SharedEngine:
    """Steps an engine on a thread of its own: the requests of all threads are batched. A context manager.

    tokens: generated so far.
    """

    def __init__(self, llm: "LLM") -> None:
        self.tokens = 0
        self._engine, self._tokenizer = SteppedEngine(llm), llm.get_tokenizer()
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()  # (prompt, sampling, its Future); None: stop
        self._thread = threading.Thread(target=self._run, daemon=True)

    def generate(self, prompt: str, max_tokens: int) -> dict[str, object]:
        """The `text` of `max_tokens` tokens after a prompt, and the number of `tokens`; ValueError if refused."""
        answer: Future = Future()
        self._inbox.put((prompt, exactly(max_tokens), answer))
        if not self._thread.is_alive():
            raise CannotRun("the engine has ended")
        return answer.result()

    def _run(self) -> None:
        requests: dict[str, tuple[list[int], Future]] = {}  # by name: tokens so far, and where they go
        names = map(str, itertools.count())
        while True:
            while not self._engine.running or not self._inbox.empty():
                arrived = self._inbox.get()
                if arrived is None:
                    return
                prompt, sampling, answer = arrived
                name = next(names)
                try:
                    self._engine.add(name, self._tokenizer.encode(prompt), sampling)
                    requests[name] = [], answer
                except Exception as error:  # of this request alone
                    answer.set_exception(error)
            try:
                outputs = self._engine.step()
            except Exception as error:  # the engine has died
                for _, answer in requests.values():
                    answer.set_exception(error)
                return
            for output in outputs:
                ids, answer = requests[output.request_id]
                ids += output.outputs[0].token_ids
                self.tokens += len(output.outputs[0].token_ids)
                if output.finished:
                    del requests[output.request_id]
                    answer.set_result({"text": self._tokenizer.decode(ids), "tokens": len(ids)})

    def __enter__(self) -> "SharedEngine":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._inbox.put(None)
        self._thread.join()


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
    """On a free port; `engine` generates for all requests, `rate` is its tokens/s over the last `window_s`."""

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
