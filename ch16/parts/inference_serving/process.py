"""The server process: its port, an answer while the model loads, vLLM's server until a signal stops it."""

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence

import psutil

from ch16.parts.inference_serving.layer import ServerSettings
from common.cli import CannotRun, first_line
from common.engine import as_flags
from common.server import listen


class LoadingResponder:
    """Answers on the server's socket while vLLM loads: alive, not ready.

    vLLM listens only once its engine is up, minutes later. Until then a probe would be refused, which looks
    like a dead process. This thread answers on the same socket and leaves it to uvicorn on `stop()`. A connection that
    arrives in between waits in the socket's backlog.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.listen(128)
        sock.setblocking(False)
        self._socket = sock
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer no more. Returns when the thread has ended."""
        self._stopping.set()
        self._thread.join()

    def _serve(self) -> None:
        while not self._stopping.is_set():
            readable, _, _ = select.select([self._socket], [], [], 0.1)
            if readable and not self._stopping.is_set():
                with contextlib.suppress(OSError):  # a client that went away or dawdled
                    connection, _ = self._socket.accept()
                    with connection:
                        connection.settimeout(0.3)
                        connection.sendall(self._answer(connection.recv(65536)))
                        connection.shutdown(socket.SHUT_WR)
                        # Closing on unread bytes would reset the connection: read on, but not for long.
                        deadline = time.monotonic() + 0.3
                        while connection.recv(65536) and time.monotonic() < deadline:
                            pass

    @staticmethod
    def _answer(request: bytes) -> bytes:
        parts = request.split(b" ", 2)
        if len(parts) > 1 and parts[1].split(b"?")[0] == b"/health":
            status, content = "200 OK", {"status": "loading"}
        else:
            error = {"message": "the model is loading", "type": "ServiceUnavailableError", "code": 503, "param": None}
            status, content = "503 Service Unavailable", {"status": "loading", "error": error}
        body = json.dumps(content)
        return (
            f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"retry-after: 5\r\nconnection: close\r\n\r\n{body}"
        ).encode()


def serve_engine(
    engine: Mapping[str, object], served_name: str, args: argparse.Namespace, vllm_flags: Sequence[str]
) -> int:
    """vLLM's server in our layer, with arguments for `vllm.LLM` and the flags of the script, until a signal.

    The port is taken, and answers "loading", before the minutes of loading begin; a signal then ends the process.

    Raises:
        CannotRun: the server could not start, or its engine died.
    """
    listener = listen(args.host, args.port)
    responder = LoadingResponder(listener)
    settings = ServerSettings(
        max_queue=args.max_queue,
        max_body_bytes=args.max_body_bytes,
        max_prompt_chars=args.max_prompt_chars,
        drain_timeout_s=args.drain_timeout,
        on_ready=responder.stop,
    )
    flags = [
        *as_flags(engine),
        *("--host", args.host, "--port", str(args.port)),
        *("--served-model-name", served_name),
        *("--seed", str(args.seed)),
        *("--scheduling-policy", "priority"),  # without priorities in the requests: first come, first served
        *("--middleware", "ch16.parts.inference_serving.layer.ServingLayer"),
        "--enable-request-id-headers",
        "--disable-uvicorn-access-log",
        *vllm_flags,
    ]
    for signum in (signal.SIGTERM, signal.SIGINT):  # until the layer takes over, there is nothing to drain
        signal.signal(signum, _end_while_loading)
    try:
        _run_vllm(flags, settings, listener)
    except Exception as error:
        raise CannotRun(f"the server failed: {first_line(error)} (its log is above)") from None
    if not settings.stopped_by_signal:
        raise CannotRun("the engine died (its log is above)")
    return 0


def _end_while_loading(signum: int, _frame: object) -> None:
    """Signal handler: end the engine's processes and this one.

    An exception raised here would be lost: while the engine loads, this process waits inside ZeroMQ, which
    takes any exception of a signal handler for an interrupted wait and goes on waiting.
    """
    engines = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "resource_tracker" not in " ".join(process.cmdline()):  # it ends last, and cleans up
                process.terminate()
                engines.append(process)
    for process in psutil.wait_procs(engines, timeout=3)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    os._exit(0 if signum == signal.SIGTERM else 130)


def _run_vllm(flags: Sequence[str], settings: ServerSettings, listener: socket.socket) -> None:
    import uvloop
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.openai.api_server import run_server_worker
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="inference_serving.py --serve"))
    args = parser.parse_args(flags)
    validate_parsed_serve_args(args)
    if (args.api_server_count or 1) > 1 or args.headless:
        parser.error("--serve runs one API server; start several replicas behind a load balancer instead")
    args.chapter = settings  # found by the layer in app.state.args
    # uvicorn gives what is left after the drain two seconds to notice that it is cancelled.
    uvloop.run(run_server_worker(f"http://{args.host}:{args.port}", listener, args, timeout_graceful_shutdown=2))
