import random
import sys
from dataclasses import replace

import psutil
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ch16.parts.serving_layouts import launch
from ch16.parts.serving_layouts.launch import (
    Command,
    Service,
    cache_tokens,
    replica_commands,
    running,
    words_tokenizer,
)
from ch16.parts.serving_layouts.plan import Layout, possible_layouts, room_for
from common import models
from common.cli import CannotRun
from common.gpu import Machine, detect
from common.models import SHAPES, Model
from common.server import ServerProcess
from common.standin import standin_command

MULTICAST_OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
MODEL = Model("owner/model", "model", SHAPES["deepseek-coder-33b"])


def machine(gpus=8):
    return Machine("cuda", "GPU", gpus, 80 * 2**30, 128, (9, 0), native_bf16=True, native_fp8=True)


def service(gpus=8, at_once=64, model=MODEL):
    return Service(model, machine(gpus), [f"GPU-{i}" for i in range(gpus)], at_once)


def flag(command, name):
    return command.words[command.words.index(name) + 1]


@given(st.integers(1, 16), st.integers(1, 4000))
def test_replicas_share_devices_and_requests(gpus, at_once):
    asked = service(gpus, at_once)
    for layout in possible_layouts(MODEL.config, gpus):
        commands = replica_commands(layout, asked)
        groups = [command.env["CUDA_VISIBLE_DEVICES"].split(",") for command in commands]
        assert [name for group in groups for name in group] == asked.devices  # each device once
        assert {len(group) for group in groups} == {layout.ranks} and len(groups) == layout.replicas
        assert all(flag(command, "--tensor-parallel") == str(layout.ranks) for command in commands)
        seats = [int(flag(command, "--max-num-seqs")) for command in commands]
        assert at_once <= sum(seats) < at_once + layout.replicas
        graphs = "--max-cudagraph-capture-size" in commands[0].words
        assert graphs == (seats[0] > launch.GRAPHS_UP_TO)  # no batch without CUDA graphs


def test_what_the_host_says_of_multicast_reaches_a_replica(monkeypatch, tmp_path):
    for name, value in MULTICAST_OFF.items():
        monkeypatch.setenv(name, value)
    (command,) = replica_commands(Layout(1, 8), service())
    assert set(command.env) == {"CUDA_VISIBLE_DEVICES"}  # nothing is turned on that the host turned off
    code = "import os; print(*(f'{name}={value}' for name, value in os.environ.items()), sep='\\n')"
    process = ServerProcess([sys.executable, "-c", code], tmp_path, command.env).start()
    process.process.wait(30)
    seen = process.log.read_text().splitlines()
    assert {f"{name}={value}" for name, value in {**MULTICAST_OFF, **command.env}.items()} <= set(seen)


def test_words_are_tokens(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "CACHE", tmp_path)
    folder = words_tokenizer(Model("p", "m", {"vocab_size": 1000}, dummy=True))
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokens = random.Random(0).choices(range(1000), k=300)
    assert tokenizer.encode(tokenizer.decode(tokens)).ids == tokens and tokenizer.get_vocab_size() == 1000


def test_random_weights_get_words(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "CACHE", tmp_path)
    (command,) = replica_commands(Layout(1, 1), service(1, model=models.dummy("tiny-llama")))
    assert flag(command, "--dummy-weights") == str(tmp_path / "shapes" / "tiny-llama")
    assert flag(command, "--tokenizer") == str(tmp_path / "words" / "512") and "--model" not in command.words
    (command,) = replica_commands(Layout(1, 1), service(1))
    assert flag(command, "--model") == "owner/model" and "--tokenizer" not in command.words


STANDIN = Command(tuple(standin_command("--step-ms", "1")[1:]), {})


@pytest.mark.slow
def test_replicas_and_gateway_come_and_go(tmp_path):
    with running([STANDIN, STANDIN], tmp_path) as (gateway, replicas):
        body = {"model": "simulated", "prompt": "a", "max_tokens": 2}
        assert requests.post(f"{gateway.url}/v1/completions", json=body, timeout=30).status_code == 200
        assert all(requests.get(f"{replica.url}/ready", timeout=30).status_code == 200 for replica in replicas)
    assert all(server.process.poll() is not None for server in (gateway, *replicas))


@pytest.mark.slow
def test_two_ranks_of_the_real_engine(tmp_path):
    """Tensor parallelism behind the gateway, as on GPUs; processes and KV cache are what the plan says."""
    layout, model = Layout(1, 2), models.dummy("tiny-llama")
    cpu = replace(machine(2), device="cpu", native_fp8=False, native_bf16=detect("cpu").native_bf16)
    with running(replica_commands(layout, Service(model, cpu, [], at_once=4)), tmp_path) as (gateway, replicas):
        body = {"model": "tiny-llama", "prompt": "t1 t22 t333", "max_tokens": 5, "ignore_eos": True}
        answer = requests.post(f"{gateway.url}/v1/completions", json=body, timeout=120).json()
        assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3, 5)
        assert cache_tokens(replicas) == room_for(model.config, layout, cpu, fp8=False).tokens
        started = [one for server in (gateway, *replicas) for one in family(server.process.pid)]
        assert len(started) == layout.processes
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in started)


def family(pid):
    """A process and what it has started, without Python's own helper for shared memory."""
    parent = psutil.Process(pid)
    children = parent.children(recursive=True)
    return [parent, *(one for one in children if "resource_tracker" not in " ".join(one.cmdline()))]


@pytest.mark.slow
def test_one_that_does_not_start_ends_all(tmp_path, monkeypatch):
    started = []
    start = ServerProcess.start
    monkeypatch.setattr(ServerProcess, "start", lambda self: started.append(self) or start(self))
    broken = Command(("-c", "raise SystemExit('no such model')"), {})
    with pytest.raises(CannotRun, match="ended with status 1: no such model"), running([STANDIN, broken], tmp_path):
        pytest.fail("it runs")
    assert len(started) == 2 and all(server.process.poll() is not None for server in started)
