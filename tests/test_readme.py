"""The READMEs are true: tables equal the JSON, and every command runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common import results
from common.gpu import detect
from tests.servers import Server

ROOT = Path(__file__).resolve().parent.parent
READMES = {str(path.relative_to(ROOT)): path.read_text() for path in results.READMES}


def commands():
    """Every line of every ```bash block, without its comment."""
    for text in READMES.values():
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in block.splitlines():
                if words := shlex.split(line, comments=True):
                    yield words, "# GPU" in line


def quick(command):
    """A command in its --quick form; each run writes a picture, to a file of the test's."""
    words = list(command) if "--quick" in command else [*command, "--quick"]
    if "--plot" in words:
        del words[words.index("--plot") : words.index("--plot") + 2]
    return tuple(words)


COMMANDS = list(dict.fromkeys((tuple(words), gpu) for words, gpu in commands()))
RUN_ON = {"--serve", "--servers", "--watch"}  # these commands run until they are stopped
TORCHRUN = ".venv/bin/torchrun"
SCRIPTS = [(c, gpu) for c, gpu in COMMANDS if c[0] in ("python3", TORCHRUN) and not RUN_ON & set(c)]
# In their --quick form several commands are the same one: it runs once.
QUICK = dict.fromkeys((quick(c), gpu) for c, gpu in SCRIPTS)
WATCHES = [c for c, _ in COMMANDS if "--watch" in c]
SERVERS = [c for c, _ in COMMANDS if "--serve" in c]
GATEWAYS = [c for c, _ in COMMANDS if "--servers" in c]
CURLS = [c for c, _ in COMMANDS if c[0] == "curl"]
MAKES = [c for c, _ in COMMANDS if c[0] == "make"]


def test_every_command_is_of_a_kind_that_is_run_here():
    known = {c for c, _ in SCRIPTS} | {*SERVERS, *GATEWAYS, *WATCHES, *CURLS, *MAKES}
    assert {c for c, _ in COMMANDS} == known and len(SERVERS) == 1 and CURLS and MAKES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "gpu"), QUICK, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_script(command, gpu, quick_run):
    """In its --quick form; a command for GPUs says in one line on a CPU why it cannot run."""
    done = quick_run(*command)
    if gpu and detect().device == "cpu":
        assert done.status == 1 and done.err.startswith("error: ") and done.err.count("\n") == 1
    else:
        assert done.status == 0, done.err[-3000:]
        shown = "Do server and clients agree?" if "monitoring.py" in command[1] else "Claims of the chapter"
        assert shown in done.out and "Traceback" not in done.err
        assert done.plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_server_and_what_is_asked_of_it(tmp_path):
    (command,) = SERVERS
    flags = [word for word in command[2:] if word not in ("--serve", "--port", "8000")]
    with Server(tmp_path, *flags) as server:
        for curl in CURLS:
            done = run([word.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}") for word in (*curl, "--fail")])
            assert done.returncode == 0 and done.stdout, curl
        for command in WATCHES:
            here = [word.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}") for word in command[1:]]
            done = run([sys.executable, *here, "--seconds", "2"])
            assert done.returncode == 0 and "hit rate" in done.stdout, done.stderr
        for script, *gateway_flags in (command[1:] for command in GATEWAYS):
            words = dict(zip(gateway_flags[::2], gateway_flags[1::2], strict=True)) | {"--servers": server.address}
            rest = [word for flag, value in words.items() if flag != "--port" for word in (flag, value)]
            with Server(tmp_path, *rest, command=(sys.executable, str(ROOT / script))) as gateway:
                assert gateway.post("/generate", {"prompt": "Once", "max_tokens": 2}).json()["completion_tokens"] == 2


@pytest.mark.slow
def test_make_demo():
    done = run(["make", "demo", "ARGS=--quick --dummy-weights tiny-llama"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Claims of the chapter" in done.stdout


def test_every_make_target_named_in_a_readme_exists():
    named = {word for text in READMES.values() for word in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "install"} <= named <= targets
    listed = run(["make", "help"]).stdout
    assert all(f"make {target} " in listed for target in named)


def run(command):
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ, timeout=500, check=False)


@pytest.mark.parametrize("name", READMES)
def test_tables_equal_the_json(name):
    assert "<!-- results: " in READMES[name]
    assert results.fill(READMES[name]) == READMES[name], "run: make tables"
