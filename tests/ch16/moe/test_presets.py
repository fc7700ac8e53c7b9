import pytest

from ch16.moe.presets import PRESETS, from_config, require_memory
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


def test_memory_that_is_not_there():
    with pytest.raises(CannotRun, match=r"deepseek-v3 needs 168\.0 GiB for its weights"):
        require_memory(PRESETS["deepseek-v3"], 64, detect("cpu"), copies=8)
    require_memory(PRESETS["small-moe"], 64, detect("cpu"))
