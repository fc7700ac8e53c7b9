"""A server that says exactly the bytes a test tells it to."""

import socket
import socketserver
import threading
from dataclasses import dataclass

STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text):
    return chunk(b'data: {"choices": [{"text": "%b"}]}\n\n' % text)


END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def reply(body=b"{}", status=b"200 OK", headers=()):
    head = [b"HTTP/1.1 " + status, b"content-length: %d" % len(body), b"content-type: application/json"]
    head += [b"connection: close", *headers]  # it does close it: else the next request may meet a closing door
    return b"\r\n".join(head) + b"\r\n\r\n" + body


@dataclass
class Request:
    """What came: `head` as one text, `body`, and the connection to answer on."""

    head: str
    body: bytes
    connection: socket.socket

    def header(self, name):
        lines = [line for line in self.head.split("\r\n")[1:] if line.lower().startswith(name + ":")]
        return lines[0].split(":", 1)[1].strip() if lines else None


class Upstream:
    """`script(request)` answers everything but /ready; the connection is closed afterwards. A context manager."""

    def __init__(self, script):
        self.script, self.ready, self.requests = script, True, []
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                data = b""
                while b"\r\n\r\n" not in data:
                    if not (part := self.request.recv(65536)):
                        return
                    data += part
                head, _, body = data.partition(b"\r\n\r\n")
                request = Request(head.decode("latin1"), body, self.request)
                while len(request.body) < int(request.header("content-length") or 0):
                    request.body += self.request.recv(65536)
                if request.head.startswith("GET /ready "):
                    self.request.sendall(reply(status=b"200 OK" if outer.ready else b"503 No"))
                else:
                    outer.requests.append(request)
                    outer.script(request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads, block_on_close, request_queue_size = True, False, 128

            def handle_error(self, request, client_address):
                pass  # the other side hung up: part of the tests

        self._server = Server(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()


def says(data):
    """A script that sends these bytes."""
    return lambda request: request.connection.sendall(data)
