"""What all tests share: the repository on sys.path, GPU tests skipped where there is no GPU, one live server."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.gpu import detect  # noqa: E402
from tests.servers import Server  # noqa: E402


def pytest_collection_modifyitems(items):
    if detect().device != "cuda":
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The production server on the bundled model: 4 sequences decoded together, 4 may wait."""
    flags = ("--max-num-seqs", "4", "--max-queue", "4", "--max-body-bytes", "300000")
    with Server(tmp_path_factory.mktemp("server"), *flags) as server:
        yield server
