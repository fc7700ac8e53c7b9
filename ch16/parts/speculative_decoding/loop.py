"""Speculative decoding, from top to bottom: draft some tokens, verify all in one pass, keep what the target would say.

The algorithm and its rejection rule are those of Leviathan et al., arXiv 2211.17192. A temperature of 0 is no special
case: the distribution is then one at the best token, and a draft is accepted if it is that token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Step:
    """The tokens that one pass of the target gave; how many had been drafted for it."""

    tokens: list[int]
    drafted: int = 0


class Target(Protocol):
    """What the loop needs of a model; see `CachedModel`."""

    def distributions(self, tokens: Sequence[int], count: int, temperature: float) -> Tensor:
        """What follows each of the last `count` tokens: [count, vocabulary]."""
        ...

    def rollback(self, length: int) -> None:
        """Forget all tokens after the first `length`."""
        ...


class Draft(Protocol):
    """Guesses what comes next."""

    def propose(
        self, tokens: Sequence[int], gamma: int, temperature: float, rng: torch.Generator
    ) -> tuple[list[int], Tensor]:
        """At most `gamma` tokens, and the distributions they were drawn from [drafted, vocabulary]."""
        ...


class CachedModel:
    """A causal model of transformers and its KV cache of the tokens seen so far."""

    def __init__(self, network: nn.Module) -> None:
        from transformers import DynamicCache  # seconds, and it reads the environment that common.engine sets

        self.network = network
        self.cache = DynamicCache()

    @torch.inference_mode()
    def distributions(self, tokens: Sequence[int], count: int, temperature: float) -> Tensor:
        """As in Target; only tokens that are not cached are computed."""
        new = torch.tensor([tokens[self.cache.get_seq_length() :]], device=self.network.device)
        logits = self.network(input_ids=new, past_key_values=self.cache, logits_to_keep=count).logits[0]
        return to_distributions(logits, temperature)

    def rollback(self, length: int) -> None:
        """As in Target."""
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


def decode(
    target: Target, prompt: Sequence[int], tokens_out: int, temperature: float, rng: torch.Generator
) -> Iterator[Step]:
    """Plain decoding: a pass of the target for each token."""
    tokens = list(prompt)
    for _ in range(tokens_out):
        tokens.append(draw(target.distributions(tokens, 1, temperature)[0], rng))
        yield Step(tokens[-1:])


def speculate(
    target: Target,
    draft: Draft,
    prompt: Sequence[int],
    tokens_out: int,
    gamma: int,
    temperature: float,
    rng: torch.Generator,
) -> Iterator[Step]:
    """Speculative decoding: a pass of the target for the accepted tokens of a draft, and one more."""
    tokens = list(prompt)
    while (left := tokens_out - (len(tokens) - len(prompt))) > 0:
        guess, q = draft.propose(tokens, min(gamma, left - 1), temperature, rng)
        p = target.distributions([*tokens, *guess], len(guess) + 1, temperature)
        accepted, token = verify(p, q, guess, rng)
        tokens += [*guess[:accepted], token]
        target.rollback(len(tokens) - 1)  # rejected tokens go; the newest was not computed yet
        yield Step(tokens[-accepted - 1 :], len(guess))


def verify(p: Tensor, q: Tensor, guess: Sequence[int], rng: torch.Generator) -> tuple[int, int]:
    """The rejection rule: how much of a guess is kept, and the token that follows it.

    Token x is kept with probability min(1, p(x) / q(x)). The first that is not is replaced by one drawn from
    `residual`; if all are kept, the target's last distribution gives one more. Either way each token is distributed as
    the target's own.

    Args:
        p: the target's distributions, [drafted + 1, vocabulary].
        q: the draft's, which the guess was drawn from, [drafted, vocabulary].
    """
    at = torch.arange(len(guess)), torch.tensor(guess, dtype=torch.long)
    kept = torch.rand(len(guess), generator=rng, device=p.device) < p[at] / q[at]
    accepted = int(kept.long().cumprod(0).sum())
    rest = p[accepted] if accepted == len(guess) else residual(p[accepted], q[accepted])
    return accepted, draw(rest, rng)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What of `p` the draft does not reach: max(0, p - q), not normalised. [vocabulary]"""
    rest = (p - q).clamp(min=0)
    return rest if rest.any() else p  # the same distributions, but for rounding
