"""The same decode steps in four launch modes: eager, compiled, and both replayed as a CUDA graph.

A CUDA graph can replay a step whose state is in tensors that stay in place: the last token, and a cache of fixed size
that knows how full it is.
"""

import os
import shutil
import time
from collections.abc import Callable

import torch
import torch.nn as nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from common.cli import CannotRun, first_line
from common.device import synchronise
from common.timing import graphed

# Relative error of logits between runs of the same kernels: a product that is split over the device may be summed in
# another order. A different computation would be off by 1.
SAME_ERROR = 0.05
# The same for fused kernels, which round less often: BF16 rounds by up to 0.4%, and that adds up over the layers (6%
# after the 32 layers of an 8B shape with random weights).
COMPILED_ERROR = 0.15


class Decoder:
    """Greedy decoding of one token per step after `prompt` [B, S], in a cache with room for `steps` more."""

    def __init__(self, network: nn.Module, prompt: torch.Tensor, steps: int) -> None:
        self.network, self.prompt = network, prompt
        self.cache = StaticCache(config=network.config, max_cache_len=prompt.shape[1] + steps)
        self.token = torch.zeros_like(prompt[:, -1:])  # [B, 1]
        self.logits: torch.Tensor | None = None  # [B, 1, vocab]
        self.rewind()

    def rewind(self) -> None:
        """Back to the end of the prompt, in the same tensors."""
        if self.logits is not None:
            self.cache.reset()
        # Logits of the last token alone: all of a long prompt would take gigabytes that nothing reads.
        output = self.network(self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        if self.logits is None:
            self.logits = output.logits.clone()
        self.token.copy_(output.logits.argmax(-1))

    def step(self) -> None:
        """One more token."""
        logits = self.network(self.token, past_key_values=self.cache, use_cache=True).logits
        self.logits.copy_(logits)
        self.token.copy_(logits.argmax(-1))

    def logits_of(
        self, step: Callable[[], object], steps: int, given: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, steps] and logits [B, steps, vocab] of `steps` steps after the prompt.

        Tokens that are `given` replace the step's own: a near-tie that flips by rounding does not change later steps.
        """
        self.rewind()
        tokens, logits = [], []
        for i in range(steps):
            step()
            tokens.append(self.token.clone())
            logits.append(self.logits.clone())
            if given is not None:
                self.token.copy_(given[:, i : i + 1])
        return torch.cat(tokens, dim=1), torch.cat(logits, dim=1)


def launch_modes(decoder: Decoder, compiled: bool) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """Modes to launch `decoder.step`, eager first, and the seconds to prepare each; CannotRun if the compiler fails.

    A step that is not replayable has eager mode only.
    """
    on_gpu = decoder.prompt.device.type == "cuda"
    replayable = not why_not_replayable(decoder)
    modes: dict[str, Callable[[], object]] = {"eager": decoder.step}
    took = {"eager": 0.0}

    def add(name: str, make: Callable[[], Callable[[], object]]) -> None:
        started = time.perf_counter()
        decoder.rewind()
        modes[name] = make()
        synchronise(decoder.prompt.device)
        took[name] = time.perf_counter() - started

    if on_gpu and replayable:
        add("CUDA graph", lambda: graphed(decoder.step))
    if compiled and replayable:
        add("compiled", lambda: _compiled(decoder))
        if on_gpu:
            add("compiled, CUDA graph", lambda: graphed(modes["compiled"]))
    return modes, took


def why_not_replayable(decoder: Decoder) -> str:
    """Why a step cannot be replayed, or compiled once for all positions; "" if it can."""
    if all(type(layer) is StaticLayer for layer in decoder.cache.layers):
        return ""
    return "this model's attention has a window, whose position transformers keeps as a Python number"


def why_not_compiled(device: str) -> str:
    """Why torch.compile cannot work here; "" if it can. Its CPU kernels are C++, its GPU launchers C."""
    name = os.environ.get("CC", "gcc") if device == "cuda" else os.environ.get("CXX", "g++")
    return "" if shutil.which(name.split()[0]) else f"no {name} on this machine"


def _compiled(decoder: Decoder) -> Callable[[], object]:
    import torch._inductor.config as inductor

    torch._dynamo.config.fail_on_recompile_limit_hit = True  # otherwise it would go on uncompiled
    inductor.cpp.enable_kernel_profile = True  # otherwise a trace lacks fused CPU kernels
    step = torch.compile(decoder.step, dynamic=False)
    try:
        step()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler has a dozen exceptions
        raise CannotRun(f"torch.compile failed: {first_line(error)}; leave it out by --no-compile") from None
    return step


def check_same(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float:
    """The largest relative error of the logits [B, steps, vocab] of a step; CannotRun if it is above `tolerance`."""
    difference = (found.float() - expected.float()).norm(dim=(0, 2)) / expected.float().norm(dim=(0, 2))  # [steps]
    error = float(difference.max())
    if not error <= tolerance:  # also true of NaN
        step = int(difference.argmax()) + 1
        raise CannotRun(f"{name} computes something else: the logits of step {step} are off by {error:.1%}")
    return error
