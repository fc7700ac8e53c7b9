import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import models
from common.cli import CannotRun
from common.gpu import Machine

CPU = Machine("cpu", "a CPU", 1, 16 << 30, 2, None, True, False)


def gpus(count, gib=80, name="NVIDIA H100 80GB HBM3", fp8=True):
    return Machine("cuda", name, count, gib << 30, 16, (9, 0), True, fp8)


@pytest.mark.parametrize(
    ("shape", "billions"),
    [("deepseek-coder-33b", 33.34), ("deepseek-coder-6.7b", 6.74), ("deepseek-coder-1.3b", 1.35), ("llama-3-8b", 8.03)],
)
def test_shapes_have_the_published_sizes(shape, billions):
    assert models.parameter_count(models.SHAPES[shape]) / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize(
    ("shape", "billions", "active"),
    [
        ("mixtral-8x7b", 46.7, 12.9),
        ("qwen3-30b-a3b", 30.5, 3.3),
        ("qwen3-235b-a22b", 235, 22),
        ("olmoe-1b-7b", 6.9, 1.3),
    ],
)
def test_what_a_token_uses_of_experts_is_as_published(shape, billions, active):
    config = models.SHAPES[shape]
    assert models.parameter_count(config) / 1e9 == pytest.approx(billions, rel=0.02)
    assert models.parameter_count(config, active=True) / 1e9 == pytest.approx(active, rel=0.03)


def test_a_token_uses_all_of_a_dense_model():
    config = models.SHAPES["llama-3-8b"]
    assert models.parameter_count(config, active=True) == models.parameter_count(config)


def test_parameter_count_equals_the_model():
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = models.SHAPES["tiny-llama"]
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    assert sum(p.numel() for p in model.parameters()) == models.parameter_count(config)


def test_other_architectures_are_not_guessed():
    assert models.parameter_count({"model_type": "mamba", "hidden_size": 8}) is None


def test_kv_bytes_by_hand():
    """Llama 3 8B: 2 x 32 layers x 8 KV heads x 128 x 2 bytes = 128 KiB a token, half in FP8."""
    assert models.kv_bytes_per_token(models.SHAPES["llama-3-8b"]) == 128 * 1024
    assert models.kv_bytes_per_token(models.SHAPES["llama-3-8b"], 1) == 64 * 1024


@pytest.mark.parametrize(
    ("heads", "kv_heads", "mlp", "available", "ranks"),
    [(56, 8, 19200, 8, 8), (9, 3, 1536, 8, 3), (9, 3, 1536, 2, 1), (32, 8, 14336, 6, 4), (32, 2, 1024, 8, 8)],
)
def test_tensor_parallel_size(heads, kv_heads, mlp, available, ranks):
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": mlp}
    assert models.tensor_parallel_size(config, available) == ranks


@given(st.integers(1, 64), st.integers(1, 16))
def test_tensor_parallel_size_always_divides(heads, available):
    ranks = models.tensor_parallel_size({"num_attention_heads": heads, "intermediate_size": 64 * heads}, available)
    assert 1 <= ranks <= available and heads % ranks == 0


@given(st.integers(1, 24), st.integers(1, 4), st.integers(1, 64), st.integers(1, 16))
def test_why_not_names_what_does_not_divide(kv_heads, group, mlp, ranks):
    config = {"num_attention_heads": kv_heads * group, "num_key_value_heads": kv_heads, "intermediate_size": mlp}
    why = models.why_not_sharded(config, ranks)
    assert bool(why) == (models.tensor_parallel_size(config, ranks) != ranks)
    assert "attention heads" not in why or kv_heads * group % ranks
    assert "KV heads" not in why or (kv_heads % ranks and ranks % kv_heads)
    assert "MLP" not in why or mlp % ranks


@pytest.mark.parametrize(
    ("machine", "chosen"),
    [
        (gpus(8), "deepseek-ai/deepseek-coder-33b-instruct"),
        (gpus(1), "deepseek-ai/deepseek-coder-33b-instruct"),  # 33 GB in FP8
        (gpus(1, fp8=False), "deepseek-ai/deepseek-coder-6.7b-instruct"),
        (gpus(1, gib=24, name="NVIDIA GeForce RTX 4090"), "deepseek-ai/deepseek-coder-6.7b-instruct"),
        (gpus(1, gib=8, name="a small GPU"), "deepseek-ai/deepseek-coder-1.3b-instruct"),
    ],
)
def test_auto_takes_the_largest_that_fits(monkeypatch, machine, chosen):
    monkeypatch.setattr(models, "_downloaded", lambda hub_id: True)
    monkeypatch.setattr(models, "_hub_config", lambda hub_id: {"vocab_size": 1})
    assert models.resolve("auto", machine).path == chosen


def test_auto_downloads_nothing():
    model = models.resolve("auto", gpus(8))
    assert model.name == models.BUNDLED
    assert "--model deepseek-ai/deepseek-coder-33b-instruct fits here and would be downloaded" in model.note


def test_auto_prefers_what_was_downloaded(monkeypatch):
    monkeypatch.setattr(models, "_downloaded", lambda hub_id: "1.3b" in hub_id)
    monkeypatch.setattr(models, "_hub_config", lambda hub_id: {"vocab_size": 1})
    assert models.resolve("auto", gpus(8)).path == "deepseek-ai/deepseek-coder-1.3b-instruct"


def test_a_download_is_complete_only_with_all_its_weights(tmp_path, monkeypatch):
    files = {
        "config.json": "{}",
        "model.safetensors.index.json": '{"weight_map": {"a": "1.st", "b": "2.st"}}',
        "1.st": "",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)

    def look_up(hub_id, name):
        return str(tmp_path / name) if (tmp_path / name).exists() else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", look_up)
    assert not models._downloaded("some/model")
    (tmp_path / "2.st").write_text("")
    assert models._downloaded("some/model")


def test_bundled_is_a_complete_checkpoint():
    model = models.resolve("auto", CPU)
    assert model.name == models.BUNDLED and model.vocab_size == 49152 and model.max_context == 8192
    assert models.parameter_count(model.config) == 134_515_008
    assert models.resolve("bundled", CPU) == model


def test_bundled_model_continues_code():
    """The converted weights are the real ones: greedy decoding writes the code everybody would."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = models.bundled().path
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    inputs = tokenizer("def add(a, b):\n    return", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0])
    assert "return a + b" in text


def test_a_local_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(models.SHAPES["tiny-llama"]))
    assert models.resolve(str(tmp_path), CPU).name == tmp_path.name
    assert models.dummy(str(tmp_path)).dummy


@pytest.mark.parametrize(("content", "message"), [(None, "no config.json"), ("{", "is not JSON")])
def test_a_folder_that_is_no_model(tmp_path, content, message):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CannotRun, match=message):
        models.resolve(str(tmp_path), CPU)


def test_a_hub_id_without_a_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CannotRun, match="hub cannot be reached for 'some/model'"):
        models.resolve("some/model", CPU)


@pytest.mark.parametrize("name", ["nope", "a/b/c", "./missing", "/missing/model", "~/missing"])
def test_names_that_mean_nothing(name):
    with pytest.raises(CannotRun, match="no model"):
        models.resolve(name, CPU)


def test_a_shape_is_never_half_written(monkeypatch, tmp_path):
    """Who reads it while another process writes it again has the old file, whole; nothing else is left."""
    monkeypatch.setattr(models, "CACHE", tmp_path)
    file = Path(models.dummy("tiny-llama").path) / "config.json"
    with open(file) as reader:
        before = os.fstat(reader.fileno()).st_ino
        models.dummy("tiny-llama")
        assert file.stat().st_ino != before and json.load(reader) == models.SHAPES["tiny-llama"]
    assert list(file.parent.iterdir()) == [file]


def test_unknown_shape():
    with pytest.raises(CannotRun, match="llama-3-8b"):
        models.dummy("llama-99")
