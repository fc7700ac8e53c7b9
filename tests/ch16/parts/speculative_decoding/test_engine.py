"""What vLLM is asked for, and what its metrics say; the waves themselves are tested with the script."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from ch16.parts.speculative_decoding import engine
from ch16.parts.speculative_decoding.engine import (
    batched,
    counts_between,
    eagle_config,
    engine_settings,
    read_counters,
    speculative_configs,
)
from ch16.parts.speculative_decoding.theory import Counts
from ch16.parts.speculative_decoding.waves import DecodedWave
from common import models
from common.cli import CannotRun
from common.gpu import detect
from common.models import SHAPES, Model

TARGET = Model("/target", "target", SHAPES["llama-3-8b"])
HEAD = {"num_hidden_layers": 1, "hidden_size": 4096, "vocab_size": 128256}


def test_what_vllm_is_asked_for():
    ngram = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
    assert speculative_configs(5, TARGET, None, None) == {"n-gram": ngram}
    small, head = Model("/small", "small", SHAPES["tiny-llama"]), Model("/head", "head", HEAD)
    configs = speculative_configs(5, TARGET, small, head)
    assert list(configs) == ["EAGLE", "smaller model", "n-gram"], "numba last"
    assert configs["smaller model"] == {"method": "draft_model", "model": "/small", "num_speculative_tokens": 5}
    assert configs["EAGLE"]["method"] == "eagle" and configs["n-gram"] == ngram


@pytest.mark.parametrize(
    ("name", "config", "method"),
    [
        ("EAGLE-LLaMA3-Instruct-8B", HEAD, "eagle"),
        ("EAGLE3-LLaMA3.1-Instruct-8B", HEAD, "eagle3"),
        ("head", HEAD | {"architectures": ["LlamaForCausalLMEagle3"]}, "eagle3"),
        ("narrow", HEAD | {"hidden_size": 2048, "target_hidden_size": 4096}, "eagle"),
    ],
)
def test_eagle_heads(name, config, method):
    assert eagle_config(3, Model("/head", name, config), TARGET) == {
        "method": method,
        "model": "/head",
        "num_speculative_tokens": 3,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 32}, "as many layers"),
        ({"hidden_size": 2048}, "hidden size or its vocabulary differs"),
        ({"vocab_size": 32000}, "hidden size or its vocabulary differs"),
    ],
)
def test_what_is_no_eagle_head(change, message):
    with pytest.raises(CannotRun, match=message):
        eagle_config(3, Model("/head", "head", HEAD | change), TARGET)


def metrics(drafts, accepted, by_position):
    prefix = "vllm:spec_decode_num_"
    return [
        SimpleNamespace(name="vllm:num_requests_running", value=1),
        SimpleNamespace(name=prefix + "drafts", value=drafts),
        SimpleNamespace(name=prefix + "draft_tokens", value=4 * drafts),
        SimpleNamespace(name=prefix + "accepted_tokens", value=accepted),
        SimpleNamespace(name=prefix + "accepted_tokens_per_pos", values=by_position),
    ]


def test_counters_between_two_readings():
    readings = [metrics(3, 5, [2, 2, 1]), metrics(13, 25, [9, 8, 8])]
    llm = SimpleNamespace(get_metrics=lambda: readings.pop(0))
    before, after = read_counters(llm), read_counters(llm)
    assert counts_between(before, after, passes=40) == Counts(steps=40, drafts=10, accepted=20, complete=7)


@pytest.mark.parametrize(("batch", "waves"), [(1, ["a", "b", "c"]), (2, ["ab", "c"]), (3, ["abc"]), (7, ["abcabca"])])
def test_batches_hold_every_prompt(monkeypatch, batch, waves):
    sent = []
    monkeypatch.setattr(
        engine, "greedy_wave", lambda llm, prompts, n: sent.append("".join(prompts)) or DecodedWave([[n]])
    )
    assert len(batched(None, "abc", batch, 9).answers) == len(waves) and sent == waves


def test_two_engines_must_fit(monkeypatch):
    machine = replace(detect("cpu"), device="cuda", count=1, memory_bytes=80 * 10**9)
    large = models.dummy("deepseek-coder-33b")
    with pytest.raises(CannotRun, match="two engines of deepseek-coder-33b share a GPU here"):
        engine_settings(large, machine, 512, 8)
    settings = engine_settings(models.dummy("llama-3-8b"), machine, 512, 8)
    assert settings["gpu_memory_utilization"] == 0.45 and "quantization" not in settings
