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

from ch16.parts.report.gather import stop  # noqa: E402
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

    @functools.cache
    def run(program, *words):
        folder = tmp_path_factory.mktemp("quick")
        results, plot, out, err = (folder / name for name in ("out.json", "out.png", "out.txt", "err.txt"))
        words = [*words, "--json", str(results), "--plot", str(plot)]
        if program == "python3":
            process = start(server, words, out, err)
            process.join(500)
            status = process.exitcode
            if status is None:
                stop(process)
        else:
            with open(out, "w") as output, open(err, "w") as errors:
                done = subprocess.run(
                    [*TORCHRUN, *words], stdout=output, stderr=errors, cwd=ROOT, timeout=500, check=False
                )
            status = done.returncode
        content = json.loads(results.read_text()) if status == 0 else {}
        return SimpleNamespace(status=status, out=out.read_text(), err=err.read_text(), json=content, plot=plot)

    return run
