"""Every way to launch decode steps makes the same tokens, and a way that does not is found out."""

import pytest
import torch

from ch16.profiling import modes
from ch16.profiling.modes import Decoder, check_same, launch_modes, why_not_compiled
from common import models
from common.cli import CannotRun
from common.gpu import detect
from common.text import load_model

STEPS = 6


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    device = detect().device
    network, _ = load_model(models.dummy("tiny-llama"), device)
    return Decoder(network, torch.randint(10, 500, (2, 30), device=device), STEPS + 1)


@torch.no_grad()
def test_the_same_tokens_as_with_a_growing_cache(decoder):
    tokens, _ = decoder.tokens(decoder.step, STEPS)
    cache, ids, expected = None, decoder.prompt, []
    for _ in range(STEPS + 1):
        output = decoder.network(ids, past_key_values=cache, use_cache=True)
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
        expected.append(ids)
    assert tokens.tolist() == torch.cat(expected[1:], dim=1).tolist()


@torch.no_grad()
def test_rewinding_repeats(decoder):
    first, logits = decoder.tokens(decoder.step, STEPS)
    again, repeated = decoder.tokens(decoder.step, STEPS)
    assert torch.equal(first, again) and torch.equal(logits, repeated)
    assert decoder.seconds(decoder.step, STEPS) > 0


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not_compiled()), reason=why_not_compiled())
@torch.no_grad()
def test_all_modes_agree(decoder):
    ways, took = launch_modes(decoder, compiled=True)
    on_gpu = decoder.prompt.is_cuda
    assert list(ways) == (
        ["eager", "CUDA graph", "compiled", "compiled, CUDA graph"] if on_gpu else ["eager", "compiled"]
    )
    expected = decoder.tokens(ways["eager"], STEPS)
    for name, step in ways.items():
        check_same(name, decoder.tokens(step, STEPS), expected, modes.COMPILED_ERROR)
    assert took["compiled"] > took["eager"] == 0


@pytest.mark.gpu
@torch.no_grad()
def test_a_cuda_graph_replays_the_same_steps(decoder):
    ways, _ = launch_modes(decoder, compiled=False)
    expected = decoder.tokens(ways["eager"], STEPS)
    assert check_same("CUDA graph", decoder.tokens(ways["CUDA graph"], STEPS), expected, modes.SAME_ERROR) > 0


def test_another_computation_is_found_out():
    logits, tokens = torch.randn(1, 1, 50), torch.tensor([[1, 2, 3, 4]])
    other = torch.tensor([[1, 2, 9, 4]])
    assert check_same("a", (other, logits * 1.01), (tokens, logits), 0.02) == 2
    for found in (logits * 1.03, -logits, logits * torch.nan):
        with pytest.raises(CannotRun, match="a computes something else"):
            check_same("a", (tokens, found), (tokens, logits), 0.02)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("CC", "sh")
    assert why_not_compiled() == "no /no/such/compiler on this machine"


def test_a_failing_compiler_is_one_line(decoder, monkeypatch):
    def broken(function, **options):
        def step():
            raise RuntimeError("ld: cannot find -lgomp\nmany lines")

        return step

    monkeypatch.setattr(modes.torch, "compile", broken)
    with pytest.raises(CannotRun, match=r"torch\.compile failed: ld: cannot find -lgomp; leave it out by --no-compile"):
        launch_modes(decoder, compiled=True)
