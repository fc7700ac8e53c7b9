import argparse
import subprocess
import sys

import pytest

from ch16.parts.load_balancer.flags import name_and_port, server_list
from tests.servers import ROOT


@pytest.mark.parametrize("text", ["a", "a:b", ":8000", "a:1,", "a:1/v1", "a:1,a:1", "https://a:1"])
def test_bad_server_lists(text):
    with pytest.raises(argparse.ArgumentTypeError):
        server_list(text)


def test_server_lists():
    assert server_list("a:1, http://b:2/,[::1]:3") == ["a:1", "b:2", "[::1]:3"]


def test_a_name_and_its_port():
    assert name_and_port("inference-server.inference.svc:8000") == ("inference-server.inference.svc", 8000)
    for text in ("inference-server", "a:1,b:2", ":8000", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            name_and_port(text)
    command = [sys.executable, str(ROOT / "ch16" / "load_balancer.py"), "--servers", "a:1", "--discover", "b:1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "not allowed with argument" in done.stderr
