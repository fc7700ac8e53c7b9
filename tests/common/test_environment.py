"""Programs of this repository, started by a Python that has none of its packages: the one below this environment."""

import re
import shutil
import signal
import subprocess
import sys
import venv

import psutil
import pytest

from common.environment import PACKAGES, ROOT, VENV
from common.server import ServerProcess

BARE = sys._base_executable
HAS_STACK = subprocess.run([BARE, "-c", "import torch, vllm"], capture_output=True, check=False).returncode == 0
pytestmark = pytest.mark.skipif(
    HAS_STACK or not VENV.exists(), reason="needs .venv, and a Python outside it that lacks the packages"
)


def run(*words, cwd=None):
    return subprocess.run([BARE, *map(str, words)], capture_output=True, text=True, cwd=cwd, check=False, timeout=120)


@pytest.fixture
def clone(tmp_path):
    """The code alone: nothing is installed."""
    for name in ("ch16", "common"):
        shutil.copytree(ROOT / name, tmp_path / "a_clone" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "a_clone"


def test_a_script_goes_on_in_the_environment(tmp_path):
    """From any folder, by a link as well; exit status and both streams are the script's."""
    link = tmp_path / "link.py"
    link.symlink_to(ROOT / "ch16" / "request_scheduler.py")
    for script in (ROOT / "ch16" / "request_scheduler.py", link):
        done = run(script, "--help", cwd=tmp_path)
        assert done.returncode == 0 and "--quick" in done.stdout and done.stderr == f"running in {VENV}\n"
    done = run(link, "--seed", "x", cwd=tmp_path)
    assert done.returncode == 2 and "invalid non_negative_int value: 'x'" in done.stderr and not done.stdout


def test_a_module_goes_on_as_well():
    done = run("-m", "common.models", cwd=ROOT)
    assert done.returncode == 0 and done.stdout.strip().endswith("SmolLM2-135M-Instruct")
    assert done.stderr == f"running in {VENV}\n"


def test_it_stays_one_process_which_gets_the_signals(tmp_path):
    """Its first line and the server's answers come from the process that was started, and so does its end."""
    server = ServerProcess([BARE, str(ROOT / "common" / "standin.py")], tmp_path)
    with server:
        assert server.tail().splitlines()[0] == f"running in {VENV}"
        started = server.process.pid
        assert psutil.Process(started).children() == [] and "standin.py" in " ".join(psutil.Process(started).cmdline())
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL


def test_an_environment_that_has_the_packages_is_used_as_it_is():
    done = subprocess.run(
        [sys.executable, ROOT / "ch16" / "request_scheduler.py", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("words", [("ch16/fp8_quant.py", "--quick"), ("-m", "common.results"), ("ch16/report.py",)])
def test_without_anything_installed_one_line_says_so(clone, words):
    done = run(*words, cwd=clone)
    assert done.returncode == 1 and not done.stdout
    assert re.fullmatch(r"error: not installed: .*torch.*; run: make install\n", done.stderr)


def test_the_line_names_the_folder_from_elsewhere(clone, tmp_path):
    done = run(clone / "ch16" / "fp8_quant.py", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.endswith(f"; run: make install (in {clone})\n")


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(file.name for file in (ROOT / "ch16").glob("*.py")))
def test_help_needs_nothing_installed(clone, script):
    """The same text as with everything."""
    bare, whole = (run(folder / "ch16" / script, "--help", cwd=clone) for folder in (clone, ROOT))
    texts = [re.sub(r"\s", "", text).replace(str(clone), str(ROOT)) for text in (bare.stdout, whole.stdout)]
    assert bare.returncode == whole.returncode == 0 and texts[0] == texts[1] and "--help" in bare.stdout
    assert bare.stderr.startswith("not installed: ") and bare.stderr.count("\n") == 1


def test_an_environment_without_the_packages_does_not_loop(clone):
    venv.create(clone / ".venv", symlinks=True)
    done = run("ch16/fp8_quant.py", "--quick", cwd=clone)
    first, second = done.stderr.splitlines()
    assert done.returncode == 1 and first == f"running in {clone / '.venv'}"
    assert second == f"error: not installed: {', '.join(PACKAGES)}; run: make install"


def test_an_environment_whose_python_is_broken_is_one_line(clone):
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").write_text("not a program")
    done = run("ch16/fp8_quant.py", "--quick", cwd=clone)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: cannot run ")
    assert done.stderr.endswith("; run: make clean install\n")
