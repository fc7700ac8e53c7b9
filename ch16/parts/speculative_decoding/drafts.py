"""A model with its KV cache, as target or as draft; drafts from the context, a smaller model, or the first layers."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

LONGEST, SHORTEST = 3, 2  # tokens that must repeat, so that what followed them is a guess


class CachedModel:
    """A model and the KV cache of the tokens it has seen; at a temperature of 0 it is greedy."""

    def __init__(self, network: nn.Module, temperature: float = 0.0) -> None:
        from transformers import DynamicCache  # seconds, and it reads the environment that common.engine sets

        self.network, self.temperature = network, temperature
        self.cache = DynamicCache()

    @torch.inference_mode()
    def distributions(self, tokens: Sequence[int], count: int) -> Tensor:
        """What follows each of the last `count` tokens: [count, vocabulary]. Computes only tokens not yet cached."""
        new = torch.tensor([tokens[self.cache.get_seq_length() :]], device=self.network.device)
        logits = self.network(input_ids=new, past_key_values=self.cache, logits_to_keep=count).logits[0]
        return to_distributions(logits, self.temperature)

    def rollback(self, length: int) -> None:
        """Forget all tokens after the first `length`."""
        surplus = self.cache.get_seq_length() - length
        if surplus > 0:
            self.cache.crop(-surplus)


def to_distributions(logits: Tensor, temperature: float) -> Tensor:
    """Softmax at a temperature, in FP32; at 0 all probability is at the largest logit. [..., vocabulary]"""
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best, 1.0)
    return torch.softmax(logits.float() / temperature, dim=-1)


def draw(probabilities: Tensor, rng: torch.Generator) -> int:
    """A token from a distribution [vocabulary], which need not add up to one."""
    return int(torch.multinomial(probabilities, 1, generator=rng))


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
