"""How much is measured, which models go together, and whether there is room for the answers."""

import pytest

from ch16.parts.speculative_decoding import checks
from ch16.parts.speculative_decoding.checks import (
    check_draft,
    check_rollback,
    checked_texts,
    context_needed,
    sizes_for,
)
from common import models
from common.cli import CannotRun
from common.gpu import detect
from common.models import Model
from common.text import load_model


def test_the_chosen_gamma_is_tried_and_tokens_are_taken():
    sizes = sizes_for(detect("cpu"), quick=True, tokens=None, gamma=6)
    assert sizes.gammas == (1, 4, 6, 8) and (sizes.loop_tokens, sizes.tokens) == (24, 24)
    longer = sizes_for(detect("cpu"), quick=True, tokens=None, gamma=25)
    assert (longer.loop_tokens, longer.tokens) == (27, 27), "a draft of 25 fits into the answer"
    assert sizes_for(detect("cpu"), quick=False, tokens=None, gamma=100).tokens == 102
    assert sizes_for(detect("cpu"), quick=False, tokens=77, gamma=4).loop_tokens == 77


class Tokenizer:
    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}


def pair(monkeypatch, target_words, draft_words):
    words = {"target": target_words, "draft": draft_words}
    monkeypatch.setattr(checks, "load_tokenizer", lambda model: Tokenizer(*words[model.name]))


def shape(name, as_name, **changes):
    model = models.dummy(name)
    return Model(model.path, as_name, {**model.config, **changes}, dummy=True)


def test_tokenizers_must_match(monkeypatch):
    pair(monkeypatch, "ab", "ba")
    with pytest.raises(CannotRun, match="draft cannot draft for target: their tokenizers do not match"):
        check_draft(shape("tiny-llama", "target"), shape("tiny-llama", "draft"))
    pair(monkeypatch, "ab", "ab")
    with pytest.raises(CannotRun, match="tokenizers do not match"):
        check_draft(shape("tiny-llama", "target"), shape("tiny-llama", "draft", vocab_size=513))
    check_draft(shape("tiny-llama", "target"), shape("tiny-llama", "draft"))


def test_a_draft_must_not_be_larger(monkeypatch):
    pair(monkeypatch, "ab", "ab")
    small, large = shape("deepseek-coder-1.3b", "draft"), shape("deepseek-coder-6.7b", "target")
    check_draft(large, small)
    with pytest.raises(CannotRun, match=r"target is larger than draft, 6,7\d\d million parameters against 1,3\d\d"):
        check_draft(small, large)


def test_a_cache_that_cannot_be_rolled_back():
    check_rollback(shape("tiny-llama", "target", layer_types=["full_attention"]))
    with pytest.raises(CannotRun, match="cannot be rolled back: it has layers of sliding_attention"):
        check_rollback(shape("tiny-llama", "target", layer_types=["full_attention", "sliding_attention"]))


def test_a_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(CannotRun, match="cannot load the tokenizer of 'empty'"):
        checks.load_tokenizer(Model(str(tmp_path), "empty", {}))


def test_the_real_model_loads_for_counting():
    network, _ = load_model(shape("tiny-llama", "target"), "meta")
    assert sum(p.numel() for p in network.parameters()) == models.parameter_count(models.SHAPES["tiny-llama"])


def test_there_is_room_for_prompt_answer_and_draft():
    sizes = sizes_for(detect("cpu"), quick=True, tokens=None, gamma=4)
    texts = checked_texts(models.bundled(), None, sizes)
    assert {name: len(of_text) for name, of_text in texts.items()} == {"copying": 2, "free": 2}
    assert context_needed(texts, sizes) == max(map(len, texts["copying"])) + 24 + 8
