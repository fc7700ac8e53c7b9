"""Where guesses come from, and which models may guess for which."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.speculative_decoding import drafts
from ch16.parts.speculative_decoding.drafts import (
    ModelDraft,
    NgramDraft,
    check_draft,
    check_rollback,
    first_layers,
    lookup,
)
from common import models
from common.cli import CannotRun
from common.models import Model
from common.text import load_model
from tests.ch16.parts.speculative_decoding.test_loop import generator, prompt_of, tiny


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_lookup_against_all_places(tokens, gamma, one, other):
    shortest, longest = sorted((one, other))
    places = [
        (-n, start)
        for n in range(shortest, longest + 1)
        for start in range(len(tokens))
        if start + n < len(tokens) and all(tokens[start + i] == tokens[len(tokens) - n + i] for i in range(n))
    ]
    expected = []
    if places:
        n, start = min(places)
        expected = tokens[start - n :][:gamma]
    assert lookup(tokens, gamma, longest, shortest) == expected


def test_an_ngram_draft_has_no_doubt():
    guess, q = NgramDraft(9).propose([5, 6, 7, 8, 5, 6], 3, 1.0, generator())
    assert guess == [7, 8, 5] and q.shape == (3, 9)
    assert q.argmax(-1).tolist() == guess and (q.sum(-1) == 1).all()
    guess, q = NgramDraft(9).propose([1, 2, 3], 3, 1.0, generator())
    assert guess == [] and q.shape == (0, 9)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_models_draft_is_what_it_would_say(temperature):
    """Also after a rejection: the draft's own cache is rolled back."""
    network, tokens = tiny(2, seed=3), prompt_of(1)
    draft = ModelDraft(network)
    for accepted in (0, 2, 4):
        guess, q = draft.propose(tokens, 4, temperature, generator(7))
        again, rows = ModelDraft(network).propose(tokens, 4, temperature, generator(7))
        assert guess == again and len(guess) == 4
        torch.testing.assert_close(q, rows, atol=1e-5, rtol=1e-4)
        tokens = [*tokens, *guess[:accepted], 9]


def test_first_layers_are_a_model_of_so_many():
    full, alone = tiny(3, seed=0), tiny(2, seed=5)
    alone.load_state_dict({k: v for k, v in full.state_dict().items() if "layers.2." not in k})
    ids = torch.tensor([prompt_of(0)])
    torch.testing.assert_close(first_layers(full, 2)(ids).logits, alone(ids).logits)
    assert full.config.num_hidden_layers == len(full.model.layers) == 3
    assert first_layers(full, 2).model.layers[0] is full.model.layers[0], "shared, not copied"


# ---- which models go together ----


class Tokenizer:
    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}


def pair(monkeypatch, target_words, draft_words):
    words = {"target": target_words, "draft": draft_words}
    monkeypatch.setattr(drafts, "load_tokenizer", lambda model: Tokenizer(*words[model.name]))


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
        drafts.load_tokenizer(Model(str(tmp_path), "empty", {}))


def test_the_real_model_loads_for_counting():
    network, _ = load_model(shape("tiny-llama", "target"), "meta")
    assert sum(p.numel() for p in network.parameters()) == models.parameter_count(models.SHAPES["tiny-llama"])
