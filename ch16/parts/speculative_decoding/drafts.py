"""Three drafts: tokens looked up in the context, a smaller model, the target's own first layers."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ch16.parts.speculative_decoding.cached import CachedModel, draw

LONGEST, SHORTEST = 3, 2  # tokens that must repeat, so that what followed them is a guess


def lookup(tokens: Sequence[int], gamma: int, longest: int = LONGEST, shortest: int = SHORTEST) -> list[int]:
    """What followed the last tokens at their first occurrence: at most `gamma` tokens, none if they are new.

    The longest match counts, from `longest` tokens down to `shortest`, as in vLLM's "ngram".
    """
    for n in range(longest, shortest - 1, -1):
        suffix = tokens[-n:]
        for start in range(len(tokens) - n):
            if tokens[start : start + n] == suffix:
                return tokens[start + n : start + n + gamma]
    return []


class NgramDraft:
    """Prompt lookup: costs almost nothing, and guesses well where the answer repeats the prompt."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def propose(self, tokens: Sequence[int], gamma: int, rng: torch.Generator) -> tuple[list[int], Tensor]:
        """At most `gamma` tokens, and their distributions: 1 at the token. [drafted, vocabulary]"""
        guess = lookup(tokens, gamma)
        at = torch.tensor(guess, dtype=torch.long, device=rng.device)
        return guess, one_hot(at, self._vocab_size).float()


class ModelDraft:
    """A model that decodes ahead of the target, with its own KV cache."""

    def __init__(self, network: nn.Module, temperature: float = 0.0) -> None:
        self._model = CachedModel(network, temperature)

    def propose(self, tokens: Sequence[int], gamma: int, rng: torch.Generator) -> tuple[list[int], Tensor]:
        """`gamma` tokens drawn one by one, and the distributions they were drawn from. [drafted, vocabulary]"""
        self._model.rollback(len(tokens) - 1)  # what the target rejected of the last guess
        guess, rows = [], []
        for _ in range(gamma):
            rows.append(self._model.distributions([*tokens, *guess], 1)[0])
            guess.append(draw(rows[-1], rng))
        return guess, torch.stack(rows) if rows else torch.empty(0, 1, device=rng.device)


def first_layers(network: nn.Module, layers: int) -> nn.Module:
    """A model of the first `layers` of a Llama-like one, its norm and its head; the weights are shared."""
    short, body = copy.copy(network), copy.copy(network.model)
    config = copy.deepcopy(network.config)
    config.num_hidden_layers = layers
    for module in (short, body):
        module._modules = dict(module._modules)
        module.config = config
    body.layers = network.model.layers[:layers]
    short.model = body
    return short
