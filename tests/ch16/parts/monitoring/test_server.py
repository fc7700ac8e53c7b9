"""The thread that steps an engine, on an engine that makes a token per request and step."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from ch16.parts.monitoring import server as module
from ch16.parts.monitoring.server import SharedEngine
from common.cli import CannotRun


class Stepped:
    """As `SteppedEngine`: `max_tokens` tokens for each request, equal to the first of its prompt."""

    def __init__(self, llm):
        self.left, self.most, self.broken = {}, 0, llm.broken

    @property
    def running(self):
        return len(self.left)

    def add(self, name, prompt, sampling):
        if len(prompt) > 5:
            raise ValueError("the prompt is too long")
        self.left[name] = [prompt[0], sampling]
        self.most = max(self.most, self.running)

    def step(self):
        if self.broken:
            raise RuntimeError("the engine died")
        outputs = []
        for name, request in list(self.left.items()):
            request[1] -= 1
            finished = not request[1]
            if finished:
                del self.left[name]
            outputs.append(
                SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=[request[0]])], finished=finished)
            )
        return outputs


@pytest.fixture
def llm(monkeypatch):
    monkeypatch.setattr(module, "SteppedEngine", Stepped)
    monkeypatch.setattr(module, "exactly", lambda tokens: tokens)
    tokenizer = SimpleNamespace(encode=lambda text: list(map(ord, text)), decode=lambda ids: "".join(map(chr, ids)))
    return SimpleNamespace(broken=False, get_tokenizer=lambda: tokenizer)


def test_every_thread_gets_its_own_answer(llm):
    with SharedEngine(llm) as engine, ThreadPoolExecutor(8) as pool:
        letters = "abcdefgh" * 20
        answers = list(pool.map(engine.generate, letters, range(1, len(letters) + 1)))
    assert [answer["text"] for answer in answers] == [letter * n for n, letter in enumerate(letters, 1)]
    assert engine.tokens == sum(answer["tokens"] for answer in answers)


def test_a_refused_request_is_its_own_affair(llm):
    with SharedEngine(llm) as engine:
        with pytest.raises(ValueError, match="too long"):
            engine.generate("too long", 1)
        assert engine.generate("a", 2) == {"text": "aa", "tokens": 2}


def test_a_dead_engine_is_said_so(llm):
    llm.broken = True
    with SharedEngine(llm) as engine:
        with pytest.raises(RuntimeError, match="died"):
            engine.generate("a", 2)
        engine._thread.join()
        with pytest.raises(CannotRun, match="ended"):
            engine.generate("a", 2)
