"""The cache of a model, and its distributions at a temperature."""

import torch

from ch16.parts.speculative_decoding.cached import CachedModel, to_distributions
from tests.ch16.parts.speculative_decoding.tiny import tiny


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
