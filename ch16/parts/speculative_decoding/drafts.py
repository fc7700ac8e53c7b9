"""Three ways to guess the next tokens: looked up in the context, by a smaller model, by the target's first layers."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ch16.parts.speculative_decoding.loop import CachedModel, draw
from common.cli import CannotRun, first_line
from common.models import Model
from common.text import load_model

LONGEST, SHORTEST = 3, 2  # tokens that must have come before, for what followed them to be a guess


def lookup(tokens: Sequence[int], gamma: int, longest: int = LONGEST, shortest: int = SHORTEST) -> list[int]:
    """What followed the last tokens when they came first: at most `gamma` tokens, none if they are new.

    The longest match counts, from `longest` tokens down to `shortest`. The rule is that of vLLM's "ngram".
    """
    for n in range(longest, shortest - 1, -1):
        suffix = tokens[-n:]
        for start in range(len(tokens) - n):
            if tokens[start : start + n] == suffix:
                return tokens[start + n : start + n + gamma]
    return []


class NgramDraft:
    """Prompt lookup: costs nothing, and is good where the answer repeats the question."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def propose(
        self, tokens: Sequence[int], gamma: int, temperature: float, rng: torch.Generator
    ) -> tuple[list[int], Tensor]:
        """A guess without doubt: its distributions are one at the token."""
        guess = lookup(tokens, gamma)
        at = torch.tensor(guess, dtype=torch.long, device=rng.device)
        return guess, one_hot(at, self._vocab_size).float()


class ModelDraft:
    """A model that decodes ahead of the target, with a KV cache of its own."""

    def __init__(self, network: nn.Module) -> None:
        self._model = CachedModel(network)

    def propose(
        self, tokens: Sequence[int], gamma: int, temperature: float, rng: torch.Generator
    ) -> tuple[list[int], Tensor]:
        """Tokens drawn one by one, and what from."""
        self._model.rollback(len(tokens) - 1)  # what the target rejected of the last guess
        guess, rows = [], []
        for _ in range(gamma):
            rows.append(self._model.distributions([*tokens, *guess], 1, temperature)[0])
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


def load_tokenizer(model: Model) -> Any:
    """The tokenizer of a model.

    Raises:
        CannotRun: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.path)
    except Exception as error:  # a dozen of exceptions; each says in its first line what is wrong
        raise CannotRun(f"cannot load the tokenizer of '{model.name}': {first_line(error)}") from None


def check_rollback(model: Model) -> None:
    """Whether the KV cache of a model can be cut at any token.

    Raises:
        CannotRun: it has layers whose state cannot (sliding windows, linear attention).
    """
    kinds = set(model.config.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise CannotRun(f"the cache of {model.name} cannot be rolled back: it has layers of {', '.join(sorted(kinds))}")


def check_draft(target: Model, draft: Model) -> None:
    """Whether one model can draft for another.

    Raises:
        CannotRun: other tokens, or a larger model.
    """
    check_rollback(draft)
    same = load_tokenizer(draft).get_vocab() == load_tokenizer(target).get_vocab()
    if not same or draft.vocab_size != target.vocab_size:
        raise CannotRun(f"{draft.name} cannot draft for {target.name}: their tokenizers do not match")
    ours, theirs = (sum(p.numel() for p in load_model(one, "meta")[0].parameters()) for one in (target, draft))
    if theirs > ours:
        raise CannotRun(
            f"{draft.name} is larger than {target.name}, {theirs / 1e6:,.0f} million parameters against "
            f"{ours / 1e6:,.0f}: it would draft slower than the target decodes"
        )
