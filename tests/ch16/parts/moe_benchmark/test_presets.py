from dataclasses import replace
from types import SimpleNamespace

import pytest

from ch16.parts.moe_benchmark.presets import PRESETS, from_config, require_memory, those_that_fit
from common import gpu
from common.cli import CannotRun
from common.gpu import detect
from common.models import SHAPES, parameter_count


def test_a_config_becomes_a_preset():
    qwen = PRESETS["qwen3-30b-a3b"]
    assert (qwen.hidden, qwen.intermediate, qwen.experts, qwen.top_k, qwen.gated) == (2048, 768, 128, 8, True)
    assert (qwen.layers, qwen.heads, qwen.kv_heads, qwen.head_dim) == (48, 32, 4, 128)
    assert PRESETS["mixtral-8x7b"].head_dim == 128 and PRESETS["mixtral-8x7b"].intermediate == 14336


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.layers])
def test_whole_models_count_as_common_models_does(name):
    """Norms aside, which the preset leaves out."""
    assert PRESETS[name].parameters == pytest.approx(parameter_count(SHAPES[name]), rel=1e-3)


@pytest.mark.parametrize("name", ["deepseek-v3", "glm-4.5-air"])
def test_models_with_other_layers_are_a_layer_only(name):
    assert PRESETS[name].layers == 0 and PRESETS[name].experts > 0


def test_a_dense_model_is_none():
    with pytest.raises(CannotRun, match="tiny-llama is no mixture of experts"):
        from_config("tiny-llama", SHAPES["tiny-llama"])


def test_memory_that_is_not_there(monkeypatch):
    machine = replace(detect("cpu"), native_bf16=True)
    monkeypatch.setattr(gpu.psutil, "virtual_memory", lambda: SimpleNamespace(available=30 << 30))
    with pytest.raises(CannotRun, match=r"deepseek-v3 needs 42\.0 GiB for its weights .* and 30\.0 GiB are free"):
        require_memory(PRESETS["deepseek-v3"], 64, machine, copies=2)
    require_memory(PRESETS["deepseek-v3"], 64, machine)
    rows = 64 * 8 * 2 * (2 * 7168 + 3 * 2048) / 2**30
    with pytest.raises(CannotRun, match=rf"and {1000 * rows:.1f} GiB for the rest"):
        require_memory(PRESETS["deepseek-v3"], 64, machine, contenders=1000)
    with pytest.raises(CannotRun):
        require_memory(PRESETS["deepseek-v3"], 64, machine, extra=9 * 2**30)
    with pytest.raises(CannotRun, match=r"needs 42\.0 GiB for its weights"):  # in FP32
        require_memory(PRESETS["deepseek-v3"], 64, replace(machine, native_bf16=False))


def test_those_that_fit(monkeypatch):
    machine, small, large = detect("cpu"), PRESETS["small-moe"], PRESETS["deepseek-v3"]
    monkeypatch.setattr(gpu.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    fitting, left_out = those_that_fit([small, large], 64, machine)
    assert fitting == [small] and len(left_out) == 1 and left_out[0].startswith("deepseek-v3 needs")
    with pytest.raises(CannotRun, match="deepseek-v3 needs"):
        those_that_fit([large], 64, machine)


@pytest.mark.parametrize("missing", ["hidden_size", "num_attention_heads", "vocab_size", "num_hidden_layers"])
def test_an_incomplete_config_is_one_line(missing):
    config = {key: value for key, value in SHAPES["qwen3-30b-a3b"].items() if key != missing}
    with pytest.raises(CannotRun, match=f"x: its config.json has no '{missing}'"):
        from_config("x", config)


@pytest.mark.parametrize("part", [{"shared_expert_intermediate_size": 4}, {"decoder_sparse_step": 2}])
def test_unequal_layers_are_not_a_whole_model(part):
    assert from_config("x", SHAPES["qwen3-30b-a3b"] | part).layers == 0
