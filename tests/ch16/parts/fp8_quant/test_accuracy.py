"""Scoring and converting a causal LM, on tiny models with random weights: arithmetic, not accuracy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from ch16.parts.fp8_quant import accuracy, layers
from ch16.parts.fp8_quant.accuracy import Scores
from ch16.parts.fp8_quant.precision import Precision
from ch16.parts.fp8_quant.sizes import Fp8Sizes
from common.cli import CannotRun

RECIPES = {name: Precision(name, layers, scaling) for name, scaling in layers.RECIPES.items()}
BF16 = Precision("BF16")


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = LlamaConfig(**(sizes | {"vocab_size": 300, "num_key_value_heads": 2} | changes))
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([[ord(c) for c in text]])}


def test_score_is_the_models_own_loss():
    model, windows = llama(), torch.randint(0, 300, (5, 33))
    scores = accuracy.score(model, windows, 2, BF16, "")
    logits = model(windows).logits.float()[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten())
    assert len(scores.loss) == 5 * 32
    assert scores.perplexity() == pytest.approx(loss.exp().item(), rel=0.01)
    assert (scores.choice == logits.argmax(-1)).float().mean() > 0.98
    assert scores.perplexity(32) == pytest.approx(math.exp(scores.loss[:32].mean()))


def test_comparison_by_hand():
    truth = torch.tensor([1, 2, 3, 4])
    reference = Scores(torch.tensor([1.0, 1.0, 1.0, 9.0]), torch.tensor([1, 2, 3, 0]), truth)
    fewer = Scores(torch.tensor([1.0, 2.0, 1.5]), torch.tensor([1, 2, 0]), truth[:3])
    row = accuracy.compare(fewer, reference)
    assert row["tokens"] == 3
    assert row["perplexity_ratio"] == pytest.approx(math.exp(0.5))
    assert row["agreement_percent"] == pytest.approx(200 / 3) and row["top1_percent"] == pytest.approx(200 / 3)
    assert row["top1_lost_percent"] == pytest.approx(100 / 3)


def test_windows():
    kept_back = accuracy.CALIBRATION_WINDOWS
    windows = accuracy.windows_of("abcdefghij" * 1000, Letters(), 10, tokens=90)
    assert windows.shape == (10 + kept_back, 10)
    assert windows.flatten().tolist() == [ord(c) for c in "abcdefghij" * (10 + kept_back)]
    with pytest.raises(CannotRun, match="the text has 20 tokens"):
        accuracy.windows_of("ab" * 10, Letters(), 10, tokens=90)


def test_all_linear_layers_but_the_head():
    names = accuracy.linears(llama())
    assert len(names) == 6 * 7 and not any("lm_head" in name for name in names)


@pytest.mark.parametrize("recipe", RECIPES)
def test_convert_and_restore(recipe):
    model, windows = llama(), torch.randint(0, 300, (4, 32))
    names = list(accuracy.linears(model))
    before = model(windows).logits
    restore = accuracy.convert(model, names[:-3], RECIPES[recipe], windows.split(2))
    assert all(isinstance(model.get_submodule(name), layers.Linear) for name in names[:-3])
    assert all(isinstance(model.get_submodule(name), torch.nn.Linear) for name in names[-3:])
    with RECIPES[recipe].compute():
        after = model(windows).logits
    assert 0 < ((after - before).norm() / before.norm()).item() < 0.2
    restore()
    assert torch.equal(model(windows).logits, before)


def test_models_without_linear_layers_are_refused():
    """GPT-2 has its own Conv1D instead."""
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    with pytest.raises(CannotRun, match="no linear layers"):
        accuracy.linears(AutoModelForCausalLM.from_config(config))


def test_odd_sizes_are_refused_by_name():
    with pytest.raises(CannotRun, match=r"model\.layers\.0\.mlp\.gate_proj.* is 100: .*multiple of 16"):
        accuracy.linears(llama(intermediate_size=100))


@given(st.integers(1, 12), st.integers(0, 6))
def test_inner_blocks(blocks, ends):
    names = [f"model.layers.{i}.mlp.{part}.0.w" for i in range(blocks) for part in ("up", "down")] + ["model.extra"]
    kept = {int(name.split(".")[2]) for name in accuracy.inner(names, ends)}
    assert kept == set(range(ends, blocks - ends))


def test_hardest_input_is_the_one_with_the_largest_outliers():
    model, window = llama(), torch.randint(0, 300, (40,))
    names, seen = list(accuracy.linears(model)), {}
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(lambda m, x, n=n: seen.update({n: x[0][0].float()}))
        for n in names
    ]
    model(window[None])
    for hook in hooks:
        hook.remove()
    name, x = accuracy.hardest_input(model, names, window)
    assert torch.equal(x.float(), seen[name])
    outliers = {n: (x.abs().max() / x.square().mean().sqrt()).item() for n, x in seen.items()}
    assert outliers[name] == max(outliers.values())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_rows_of_the_measurement():
    """Every recipe on the trial, delayed twice, the best on everything; the model is as before."""
    model, windows = llama(), torch.randint(0, 300, (12 + 4, 32))
    sizes = Fp8Sizes(window=32, batch=4, trial_tokens=62)
    before = model(windows).logits
    rows = accuracy.measure_accuracy(model, windows, list(RECIPES.values()), sizes)
    assert [row["recipe"] for row in rows[:3]] == ["BF16", "delayed, not calibrated", "delayed"]
    assert [row["tokens"] for row in rows] == [12 * 31] + [62] * (len(rows) - 2) + [12 * 31]
    assert rows[0]["weight_ratio"] == 1 and all(0.5 <= row["weight_ratio"] < 0.9 for row in rows[1:])
    assert rows[-1]["recipe"] in [row["recipe"] for row in rows[:-1]] and "weights" not in rows[-1]["recipe"]
    assert torch.equal(model(windows).logits, before)


def test_a_trial_of_everything_is_not_repeated():
    sizes = Fp8Sizes(window=32, batch=4, trial_tokens=10_000)
    rows = accuracy.measure_accuracy(llama(), torch.randint(0, 300, (8 + 4, 32)), [RECIPES["row"]], sizes)
    assert len({row["recipe"] for row in rows}) == len(rows)
    assert rows[-1]["perplexity"] == min(row["perplexity"] for row in rows[1:])
