import socket

import requests

from ch16.parts.inference_serving.process import LoadingResponder
from common.server import free_port


def test_loading_responder_answers_and_hands_over():
    listener = socket.socket()
    listener.bind(("127.0.0.1", free_port()))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    responder = LoadingResponder(listener)
    assert requests.get(url + "/health", timeout=5).json() == {"status": "loading"}
    assert requests.get(url + "/ready", timeout=5).status_code == 503
    answer = requests.post(url + "/generate", data=b"x" * 200_000, timeout=5)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
    with socket.create_connection(listener.getsockname()):
        pass  # a port scan
    assert requests.get(url + "/health", timeout=5).status_code == 200
    responder.stop()
    # The socket still listens: a connection waits for uvicorn instead of being refused.
    with socket.create_connection(listener.getsockname(), timeout=5):
        listener.setblocking(True)
        listener.settimeout(5)
        listener.accept()[0].close()
    listener.close()
