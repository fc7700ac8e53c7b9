"""Counted work against PyTorch's own counter and numbers worked by hand; limits from the data sheet or measured."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ch16.parts.inference_profiling import work
from ch16.parts.inference_profiling.work import Limits, Weights, count, limits_of, require_countable
from common import models
from common.cli import CannotRun
from common.gpu import Peak, detect
from common.models import SHAPES, Model, parameter_count
from common.text import load_model
from common.timing import Timing


def weights_of(name):
    return Weights.of(load_model(models.dummy(name), "meta")[0], name)


@pytest.mark.parametrize("name", ["llama-3-8b", "tiny-llama"])
def test_weights_are_the_parameters_without_embedding_and_norms(name):
    config, weights = SHAPES[name], weights_of(name)
    norms = (2 * config["num_hidden_layers"] + 1) * config["hidden_size"]
    embedding = config["vocab_size"] * config["hidden_size"]
    assert weights.layers + weights.head + embedding + norms == parameter_count(config)


def test_shared_embeddings_are_a_head():
    model = models.bundled()
    weights = Weights.of(load_model(model, "meta")[0], model.name)
    assert weights.head == 49152 * 576 and weights.layers == 30 * (576 * (2 * 576 + 2 * 192) + 3 * 576 * 1536)


def test_a_mixture_is_not_counted():
    with pytest.raises(CannotRun, match="the work of small-moe cannot be counted"):
        weights_of("small-moe")


def test_flops_as_pytorch_counts_them():
    """Its counter sees whole squares of attention scores, ours half of them and the diagonal."""
    network, _ = load_model(models.dummy("tiny-llama"), "cpu")
    network.set_attn_implementation("eager")  # plain products: the fused kernel of CPUs is not counted
    config, batch, tokens = SHAPES["tiny-llama"], 3, 17
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.ones(batch, tokens, dtype=torch.long))
    ours = count(weights_of("tiny-llama"), config, tokens, 0, tokens, batch).flops
    unseen = 4 * config["num_hidden_layers"] * config["hidden_size"] * batch * tokens * (tokens - 1) / 2
    assert counter.get_total_flops() == ours + unseen


def test_a_decode_step_by_hand():
    """Two sequences, 100 tokens of context: weights once, 2 FLOPs each and sequence; 101 keys for each of 4 heads."""
    config, weights = SHAPES["tiny-llama"], weights_of("tiny-llama")
    step = count(weights, config, 1, 100, 1, batch=2)
    assert step.flops == 2 * (2 * (weights.layers + weights.head) + 4 * 2 * 4 * 32 * 101)
    assert step.bytes == 2 * (weights.layers + weights.head) + 2 * 101 * (2 * 2 * 2 * 32 * 2)


@given(st.integers(1, 200), st.integers(0, 200), st.integers(1, 8))
def test_a_prompt_in_two_parts_is_the_same_arithmetic(tokens, more, batch):
    weights, config = Weights(1000, 100), SHAPES["tiny-llama"]
    whole = count(weights, config, tokens + more, 0, 0, batch)
    parts = count(weights, config, tokens, 0, 0, batch) + count(weights, config, more, tokens, 0, batch)
    assert whole.flops == parts.flops and whole.bytes < parts.bytes


def test_limits_are_the_data_sheet_or_measured():
    machine = detect("cpu")
    assert limits_of(machine).source.startswith("measured now")
    known = dataclasses.replace(machine, peak=Peak(bf16_flops=2e12, bytes_per_s=1e11))
    assert limits_of(known) == Limits(2e12, 1e11, "data sheet")


@pytest.mark.parametrize(
    ("device", "native", "size", "name"),
    [("cuda", True, 8192, "BF16"), ("cpu", True, 2048, "BF16"), ("cpu", False, 2048, "FP32")],
)
def test_the_measured_product_fills_the_device_and_is_not_emulated(device, native, size, name, monkeypatch):
    """By stand-ins: a GPU would do 2,048 by 2,048 in the time of its launch."""
    asked, types = [], set()
    monkeypatch.setattr(work.torch, "randn", lambda *shape, dtype, **_: (asked.append(shape), types.add(dtype)))
    monkeypatch.setattr(work.torch, "ones", lambda count, **_: torch.empty(count, device="meta"))
    monkeypatch.setattr(work, "measure", lambda *args, **kwargs: Timing((0.5, 0.25)))
    measured = limits_of(dataclasses.replace(detect("cpu"), device=device, native_bf16=native))
    assert asked == [(size, size)] * 2 and f"{size} by {size} in {name}" in measured.source
    assert types == {torch.bfloat16 if native else torch.float32}
    assert (measured.flops_per_s, measured.bytes_per_s) == (2 * size**3 / 0.25, 2**28 / 0.25)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_attention_heads": None}, "has no num_attention_heads"),
        ({"quantization_config": {}}, "weights are quantized"),
        ({"sliding_window": 512}, "has a window of 512 tokens"),
    ],
)
def test_what_cannot_be_counted(change, problem):
    with pytest.raises(CannotRun, match=f"the work of m cannot be counted: .*{problem}"):
        require_countable(Model("p", "m", SHAPES["tiny-llama"] | change))
    require_countable(Model("p", "m", SHAPES["mixtral-8x7b"]))
    require_countable(Model("p", "m", SHAPES["tiny-llama"] | {"sliding_window": 512, "use_sliding_window": False}))
