"""A causal model of transformers with its KV cache, as target or as draft."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


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
