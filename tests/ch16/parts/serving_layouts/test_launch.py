import random

import pytest
import requests
from tokenizers import Tokenizer

from ch16.parts.serving_layouts.launch import Command, running, words_tokenizer
from common import models
from common.cli import CannotRun
from common.models import Model
from common.server import ServerProcess
from common.standin import standin_command


def test_words_are_tokens(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "CACHE", tmp_path)
    folder = words_tokenizer(Model("p", "m", {"vocab_size": 1000}, dummy=True))
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokens = random.Random(0).choices(range(1000), k=300)
    assert tokenizer.encode(tokenizer.decode(tokens)).ids == tokens and tokenizer.get_vocab_size() == 1000


STANDIN = Command(tuple(standin_command("--step-ms", "1")[1:]), {})


@pytest.mark.slow
def test_replicas_and_gateway_come_and_go(tmp_path):
    with running([STANDIN, STANDIN], tmp_path) as (gateway, replicas):
        body = {"model": "simulated", "prompt": "a", "max_tokens": 2}
        assert requests.post(f"{gateway.url}/v1/completions", json=body, timeout=30).status_code == 200
        assert all(requests.get(f"{replica.url}/ready", timeout=30).status_code == 200 for replica in replicas)
    assert all(server.process.poll() is not None for server in (gateway, *replicas))


@pytest.mark.slow
def test_one_that_does_not_start_ends_all(tmp_path, monkeypatch):
    started = []
    start = ServerProcess.start
    monkeypatch.setattr(ServerProcess, "start", lambda self: started.append(self) or start(self))
    broken = Command(("-c", "raise SystemExit('no such model')"), {})
    with pytest.raises(CannotRun, match="ended with status 1: no such model"), running([STANDIN, broken], tmp_path):
        pytest.fail("it runs")
    assert len(started) == 2 and all(server.process.poll() is not None for server in started)
