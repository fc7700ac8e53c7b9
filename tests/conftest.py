"""What all tests share: the repository on sys.path, GPU tests skipped where there is no GPU, one live server, one run
of each of the README's commands."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.gpu import detect  # noqa: E402
from tests.ranks import TORCHRUN  # noqa: E402
from tests.servers import Server  # noqa: E402

settings.register_profile("any machine", deadline=None)  # no test depends on a time
settings.load_profile("any machine")


def pytest_collection_modifyitems(items):
    if detect().device != "cuda":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The production server on the bundled model: 4 sequences decoded together, 4 may wait."""
    flags = ("--max-num-seqs", "4", "--max-queue", "4", "--max-body-bytes", "300000")
    with Server(tmp_path_factory.mktemp("server"), *flags) as server:
        yield server


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    """Runs a command of the README, once for all tests that ask: `status`, `out`, `err`, the `json`, the `plot`."""
    starters = {"python3": (sys.executable,), "torchrun": TORCHRUN}

    @functools.cache
    def run(*command):
        folder = tmp_path_factory.mktemp("quick")
        files = folder / "out.json", folder / "out.png"
        words = [*starters[command[0]], *command[1:], "--json", str(files[0]), "--plot", str(files[1])]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=500, check=False)
        content = json.loads(files[0].read_text()) if done.returncode == 0 else {}
        return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr, json=content, plot=files[1])

    return run
