"""What all tests share: the repository on sys.path, GPU tests skipped where there is no GPU, one live server, one run
of each of the README's commands, also where several processes of pytest-xdist share the work."""

import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each: threads of two engines on the same cores wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from ch16.parts.report.gather import ends  # noqa: E402
from ch16.parts.report.processes import fork_server, start  # noqa: E402
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
    """Runs a command of the README, once for all tests that ask: `status`, `out`, `err`, the `json`, the `plot`.

    Scripts start as in `make report`: from a process that has imported vLLM.
    """
    server = fork_server()
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers: one runs a command, the others wait for its files

    @functools.cache
    def run(*command):
        name = hashlib.sha256(" ".join(command).encode()).hexdigest()[:12]
        folder = shared / f"quick-{name}"
        with FileLock(shared / f"quick-{name}.lock"):
            if not folder.exists():
                folder.mkdir()
                (folder / "status.txt").write_text(str(execute(server, folder, *command)))
        out, err, plot = (folder / file for file in ("out.txt", "err.txt", "out.png"))
        status = int((folder / "status.txt").read_text())
        content = json.loads((folder / "out.json").read_text()) if status == 0 else {}
        return SimpleNamespace(status=status, out=out.read_text(), err=err.read_text(), json=content, plot=plot)

    return run


def execute(server, folder, program, *words):
    """Runs a script or torchrun, with its files and what it prints in a folder. Returns its exit status."""
    out, err = folder / "out.txt", folder / "err.txt"
    words = [*words, "--json", str(folder / "out.json"), "--plot", str(folder / "out.png")]
    if program == "python3":
        process = start(server, words, out, err)
        ends(process, 500)
        return process.exitcode
    with open(out, "w") as output, open(err, "w") as errors:
        done = subprocess.run([*TORCHRUN, *words], stdout=output, stderr=errors, cwd=ROOT, timeout=500, check=False)
    return done.returncode
