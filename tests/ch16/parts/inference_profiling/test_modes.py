"""Every way to launch decode steps makes the same tokens, and a way that does not is found out."""

import json

import pytest
import torch

from ch16.parts.inference_profiling import modes
from ch16.parts.inference_profiling.modes import Decoder, check_same, launch_modes, why_not_compiled, why_not_replayable
from common import models
from common.cli import CannotRun
from common.gpu import detect
from common.models import SHAPES
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
    tokens, _ = decoder.logits_of(decoder.step, STEPS)
    cache, ids, expected = None, decoder.prompt, []
    for _ in range(STEPS + 1):
        output = decoder.network(ids, past_key_values=cache, use_cache=True)
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
        expected.append(ids)
    assert tokens.tolist() == torch.cat(expected[1:], dim=1).tolist()


@torch.no_grad()
def test_rewinding_repeats(decoder):
    tokens, logits = decoder.logits_of(decoder.step, STEPS)
    again, repeated = decoder.logits_of(decoder.step, STEPS)
    assert logits.shape == (2, STEPS, 512)
    assert torch.equal(tokens, again) and check_same("eager", repeated, logits, modes.SAME_ERROR) < 0.01


@torch.no_grad()
def test_given_tokens_are_followed(decoder):
    """One other token, and the logits after it are others; before it, they are not."""
    tokens, logits = decoder.logits_of(decoder.step, STEPS)
    given = tokens.clone()
    given[:, 2] = (given[:, 2] + 1) % 500
    _, other = decoder.logits_of(decoder.step, STEPS, given)
    assert torch.allclose(other[:, :3], logits[:, :3], atol=0.05) and not torch.allclose(other[:, 3:], logits[:, 3:])


@torch.no_grad()
def test_a_step_that_stays_where_it_is_is_found_out(decoder):
    """The first step is right, and then the position no longer moves: what a graph of a Python number would do."""
    _, expected = decoder.logits_of(decoder.step, STEPS)
    prompt = decoder.prompt.shape[1]

    def stuck():
        for layer in decoder.cache.layers:
            layer.cumulative_length.fill_(prompt)
        decoder.step()

    _, found = decoder.logits_of(stuck, STEPS)
    assert torch.allclose(found[:, 0], expected[:, 0], atol=0.05)
    with pytest.raises(CannotRun, match=r"stuck computes something else: the logits of step [2-6]"):
        check_same("stuck", found, expected, modes.SAME_ERROR)


@torch.no_grad()
def test_windows_are_launched_eagerly(tmp_path):
    config = SHAPES["tiny-llama"] | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": 16}))
    network, _ = load_model(models.dummy(str(tmp_path)), "cpu")
    windowed = Decoder(network, torch.randint(10, 500, (1, 30)), STEPS + 1)
    assert "has a window" in why_not_replayable(windowed)
    assert list(launch_modes(windowed, compiled=True)[0]) == ["eager"]


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not_compiled(detect().device)), reason=why_not_compiled(detect().device))
@torch.no_grad()
def test_all_modes_agree(decoder):
    assert why_not_replayable(decoder) == ""
    ways, _ = launch_modes(decoder, compiled=True)
    on_gpu = ["eager", "CUDA graph", "compiled", "compiled, CUDA graph"]
    assert list(ways) == (on_gpu if decoder.prompt.is_cuda else ["eager", "compiled"])
    tokens, expected = decoder.logits_of(ways["eager"], STEPS)
    for name, step in ways.items():
        tolerance = modes.COMPILED_ERROR if "compiled" in name else modes.SAME_ERROR
        check_same(name, decoder.logits_of(step, STEPS, tokens)[1], expected, tolerance)


@pytest.mark.gpu
@torch.no_grad()
def test_a_cuda_graph_replays_the_same_steps(decoder):
    ways, _ = launch_modes(decoder, compiled=False)
    tokens, expected = decoder.logits_of(ways["eager"], STEPS)
    check_same("CUDA graph", decoder.logits_of(ways["CUDA graph"], STEPS, tokens)[1], expected, modes.SAME_ERROR)


def test_another_computation_is_found_out():
    logits = torch.randn(1, 4, 50)
    assert check_same("a", logits * 1.01, logits, 0.02) == pytest.approx(0.01, rel=0.01)
    late = logits.clone()
    late[:, 3] = -late[:, 3]
    for found in (logits * 1.03, late, logits * torch.nan):
        with pytest.raises(CannotRun, match="a computes something else"):
            check_same("a", found, logits, 0.02)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler -O2")
    monkeypatch.setenv("CC", "sh -c")
    assert why_not_compiled("cpu") == "no /no/such/compiler -O2 on this machine" and why_not_compiled("cuda") == ""


def test_a_failing_compiler_is_one_line(decoder, monkeypatch):
    def broken(function, **options):
        def step():
            raise RuntimeError("ld: cannot find -lgomp\nmany lines")

        return step

    monkeypatch.setattr(modes.torch, "compile", broken)
    with pytest.raises(CannotRun, match=r"torch\.compile failed: ld: cannot find -lgomp; leave it out by --no-compile"):
        launch_modes(decoder, compiled=True)
