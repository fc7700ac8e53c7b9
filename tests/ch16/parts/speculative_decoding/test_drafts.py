"""The cache of a model, its distributions at a temperature, and where guesses come from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.speculative_decoding.drafts import (
    CachedModel,
    ModelDraft,
    NgramDraft,
    first_layers,
    lookup,
    to_distributions,
)
from tests.ch16.parts.speculative_decoding.tiny import generator, prompt_of, tiny


def test_rollback_goes_no_further_than_asked():
    model = CachedModel(tiny(layers=3, seed=0))
    model.distributions([1, 2, 3, 4], 1)
    for length, left in ((9, 4), (4, 4), (2, 2)):
        model.rollback(length)
        assert model.cache.get_seq_length() == left


def test_temperature():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert to_distributions(logits, 0).tolist() == [[0, 1, 0]]
    torch.testing.assert_close(to_distributions(logits, 2.0), torch.softmax(logits / 2, -1))


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
    guess, q = NgramDraft(9).propose([5, 6, 7, 8, 5, 6], 3, generator())
    assert guess == [7, 8, 5] and q.shape == (3, 9)
    assert q.argmax(-1).tolist() == guess and (q.sum(-1) == 1).all()
    guess, q = NgramDraft(9).propose([1, 2, 3], 3, generator())
    assert guess == [] and q.shape == (0, 9)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_models_draft_is_what_it_would_say(temperature):
    """Also after a rejection: the draft's own cache is rolled back."""
    network, tokens = tiny(2, seed=3), prompt_of(1)
    draft = ModelDraft(network, temperature)
    for accepted in (0, 2, 4):
        guess, q = draft.propose(tokens, 4, generator(7))
        again, rows = ModelDraft(network, temperature).propose(tokens, 4, generator(7))
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
