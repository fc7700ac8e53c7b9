import signal
import socket
import sys

import psutil
import pytest
import requests

from common.cli import CannotRun
from common.server import ServerProcess, free_port, listen
from common.standin import standin_command

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_listen_on_a_free_port_and_on_a_taken_one():
    with listen("127.0.0.1", free_port()) as listener:
        listener.listen()
        with pytest.raises(
            CannotRun, match=r"cannot listen on 127.0.0.1:.* Address already in use; choose another --port"
        ):
            listen("127.0.0.1", listener.getsockname()[1])
    with pytest.raises(CannotRun):
        listen("127.0.0.1", 99_999)
    with listen("::1", 0) as listener:
        assert listener.family == socket.AF_INET6


def test_starts_again_on_the_same_port(tmp_path):
    with ServerProcess(standin_command(), tmp_path) as server:
        assert requests.get(server.url + "/health", timeout=5).status_code == 200
        server.signal_all(signal.SIGKILL)
        assert server.process.wait() == -signal.SIGKILL
        server.start().wait_ready()
        assert requests.get(server.url + "/health", timeout=5).status_code == 200
    assert server.process.returncode == 0


def test_a_server_that_ends_says_why(tmp_path):
    with pytest.raises(CannotRun, match="ended with status 3: too bad"):
        ServerProcess([sys.executable, "-c", "import sys; print('too bad'); sys.exit(3)"], tmp_path).__enter__()


def test_stopping_leaves_nobody_behind(tmp_path):
    server = ServerProcess([sys.executable, "-c", PARENT], tmp_path).start()
    while not server.tail():
        assert server.process.poll() is None
    child = psutil.Process(int(server.tail()))
    assert server.stop(signal.SIGTERM) == -signal.SIGTERM
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
