"""The same decode steps launched in four ways: eager, compiled, and both replayed as a CUDA graph.

A step that a CUDA graph can replay finds all its state in tensors that stay where they are: the last token, and a cache
of fixed size that knows how full it is.
"""

import os
import shutil
import time
from collections.abc import Callable

import torch
import torch.nn as nn
from transformers import StaticCache

from common.cli import CannotRun, first_line
from common.timing import graphed

# Relative error of logits by which two runs of the same kernels may differ: some sum in the order in which they finish.
SAME_ERROR = 0.01
# And by which fused kernels, which round less often, may differ: BF16 rounds by up to 0.4%, and
# that adds up over the layers (6% after the 32 of an 8B shape with random weights). Another computation is off by 1.
COMPILED_ERROR = 0.15


class Decoder:
    """Greedy decoding of one token a step for each of `prompt` [B, S], in a cache with room for `steps` more."""

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
        # Logits of the last token alone: those of a long prompt would need gigabytes that nothing reads.
        output = self.network(self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        if self.logits is None:
            self.logits = output.logits.clone()
        self.token.copy_(output.logits.argmax(-1))

    def step(self) -> None:
        """One more token."""
        logits = self.network(self.token, past_key_values=self.cache, use_cache=True).logits
        self.logits.copy_(logits)
        self.token.copy_(logits.argmax(-1))

    def tokens(self, step: Callable[[], object], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, steps] that `step` makes from the prompt on, and the logits [B, 1, vocab] of its first call."""
        self.rewind()
        made, first = [], None
        for _ in range(steps):
            step()
            first = self.logits.clone() if first is None else first
            made.append(self.token.clone())
        return torch.cat(made, dim=1), first

    def seconds(self, step: Callable[[], object], steps: int) -> float:
        """Wall time of `steps` calls from the prompt on; on a GPU until the device is done."""
        self.rewind()
        synchronise(self.prompt.device)
        started = time.perf_counter()
        for _ in range(steps):
            step()
        synchronise(self.prompt.device)
        return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def launch_modes(decoder: Decoder, compiled: bool) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """Ways to launch `decoder.step`, the first of them eager; and the seconds each took to prepare.

    Args:
        compiled: also by torch.compile.

    Raises:
        CannotRun: the compiler failed.
    """
    on_gpu = decoder.prompt.device.type == "cuda"
    modes: dict[str, Callable[[], object]] = {"eager": decoder.step}
    took = {"eager": 0.0}

    def add(name: str, make: Callable[[], Callable[[], object]]) -> None:
        started = time.perf_counter()
        decoder.rewind()
        modes[name] = make()
        synchronise(decoder.prompt.device)
        took[name] = time.perf_counter() - started

    if on_gpu:
        add("CUDA graph", lambda: graphed(decoder.step))
    if compiled:
        add("compiled", lambda: _compiled(decoder))
        if on_gpu:
            add("compiled, CUDA graph", lambda: graphed(modes["compiled"]))
    return modes, took


def why_not_compiled() -> str:
    """Why torch.compile cannot work here; "" if it can: its CPU kernels are C++, its GPU launchers C."""
    compilers = (os.environ.get("CXX", "g++"), os.environ.get("CC", "gcc"))
    missing = [name for name in compilers if shutil.which(name) is None]
    return f"no {' and no '.join(missing)} on this machine" if missing else ""


def _compiled(decoder: Decoder) -> Callable[[], object]:
    import torch._inductor.config as inductor

    inductor.cpp.enable_kernel_profile = True  # else fused CPU kernels would be missing in a trace
    step = torch.compile(decoder.step, dynamic=False)
    try:
        step()
    except Exception as error:  # the compiler has a dozen exceptions
        raise CannotRun(f"torch.compile failed: {first_line(error)}; leave it out by --no-compile") from None
    return step


def check_same(name: str, found: tuple, expected: tuple, tolerance: float) -> int:
    """How many of the tokens that two modes made are the same, from the first on.

    Raises:
        CannotRun: the first logits differ by more than `tolerance`, relative to their norm.
    """
    (tokens, logits), (other, reference) = found, expected
    error = float((logits.float() - reference.float()).norm() / reference.float().norm())
    same = int((tokens == other).all(dim=0).cumprod(0).sum())  # from the first on, in all sequences
    if not error <= tolerance:  # not a number is no less wrong
        raise CannotRun(f"{name} computes something else: logits off by {error:.2%}, {same} tokens the same")
    return same
