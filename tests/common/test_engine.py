from dataclasses import replace

import pytest

from common import engine
from common.cli import CannotRun
from common.gpu import Machine
from common.models import SHAPES, Model, kv_bytes_per_token

H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", 8, 80 << 30, 16, (9, 0), True, True)
A100 = Machine("cuda", "NVIDIA A100-SXM4-80GB", 1, 80 << 30, 16, (8, 0), True, False)
CPU = Machine("cpu", "a CPU", 1, 16 << 30, 2, None, True, False)
MODEL = Model("path", "deepseek-coder-33b", SHAPES["deepseek-coder-33b"])
TINY = Model("path", "tiny-llama", SHAPES["tiny-llama"], dummy=True)
NARROW = Model("path", "narrow", SHAPES["tiny-llama"] | {"intermediate_size": 258})
SIX_KV_HEADS = Model("path", "six", SHAPES["tiny-llama"] | {"num_attention_heads": 12, "num_key_value_heads": 6})
SMALL = Machine("cuda", "NVIDIA A100-SXM4-40GB", 1, 40 << 30, 16, (8, 0), True, False)
TWO_SMALLER = Machine("cuda", "NVIDIA GeForce RTX 3090", 2, 24 << 30, 16, (8, 6), True, False)


def test_eight_gpus_get_the_chapters_settings():
    args = engine.engine_args(MODEL, H100)
    assert args["tensor_parallel_size"] == 8 and args["gpu_memory_utilization"] == 0.9
    assert args["enforce_eager"] is False and args["enable_prefix_caching"] is True
    assert (args["quantization"], args["kv_cache_dtype"], args["max_model_len"]) == ("fp8", "fp8", 4096)


def test_no_fp8_without_fp8_units():
    small = Model("path", "deepseek-coder-6.7b", SHAPES["deepseek-coder-6.7b"])
    assert "quantization" not in engine.engine_args(small, A100)
    with pytest.raises(CannotRun, match="no FP8 units"):
        engine.engine_args(small, A100, quantization="fp8")


def test_bf16_on_request():
    assert "quantization" not in engine.engine_args(MODEL, H100, quantization="none")


def test_cpu_is_eager_and_small():
    args = engine.engine_args(TINY, CPU)
    assert args["enforce_eager"] is True and args["max_num_seqs"] == 32 and "gpu_memory_utilization" not in args
    assert args["load_format"] == "dummy" and args["max_model_len"] == 2048
    assert args["kv_cache_memory_bytes"] == 2**30


def test_the_longest_sequence_has_room_on_a_cpu():
    model = Model("", "deepseek-coder-1.3b", SHAPES["deepseek-coder-1.3b"])
    room = engine.engine_args(model, replace(CPU, native_bf16=False))["kv_cache_memory_bytes"]
    assert room >= 4096 * kv_bytes_per_token(model.config, 4) > 2**30
    assert "kv_cache_memory_bytes" not in engine.engine_args(model, A100)
    other = Model("", "other", {"vocab_size": 8, "max_position_embeddings": 64})
    assert engine.engine_args(other, CPU)["kv_cache_memory_bytes"] == 2**30


def test_without_bf16_units_the_engine_computes_in_what_there_is():
    model = Model("", "tiny", SHAPES["tiny-llama"])
    assert "dtype" not in engine.engine_args(model, CPU)
    assert engine.engine_args(model, replace(CPU, native_bf16=False))["dtype"] == "float32"
    assert engine.engine_args(model, replace(SMALL, native_bf16=False))["dtype"] == "float16"
    with pytest.raises(CannotRun, match="GiB of weights"):  # 8B of them, 4 bytes each
        engine.engine_args(Model("", "llama-3-8b", SHAPES["llama-3-8b"]), replace(CPU, native_bf16=False))


@pytest.mark.parametrize(
    ("model", "machine", "settings", "message"),
    [
        (MODEL, SMALL, {}, "62 GiB of weights, a GPU has 36 GiB to use; take a smaller --model or more GPUs$"),
        (MODEL, TWO_SMALLER, {}, "31 GiB of weights on each of 2 GPUs, a GPU has 22 GiB to use"),
        (MODEL, CPU, {}, "62 GiB of weights, this machine has 14 GiB to use; take a smaller --model$"),
        (MODEL, CPU, {"tensor_parallel": 2}, "62 GiB of weights, this machine has 14 GiB to use"),
        (MODEL, A100, {"tensor_parallel": 2}, "this machine has 1"),
        (MODEL, H100, {"tensor_parallel": 3}, "cannot be sharded: 56 attention heads do not divide over 3 ranks"),
        (NARROW, H100, {"tensor_parallel": 4}, "cannot be sharded: an MLP 258 wide does not divide over 4 ranks"),
        (SIX_KV_HEADS, H100, {"tensor_parallel": 4}, "cannot be sharded: 6 KV heads neither divide over 4 ranks nor"),
    ],
)
def test_what_cannot_work_is_refused_before_it_starts(model, machine, settings, message):
    with pytest.raises(CannotRun, match=message):
        engine.engine_args(model, machine, **settings)


def test_a_checkpoint_that_is_quantized_already_is_left_as_it_is():
    config = SHAPES["deepseek-coder-33b"] | {"quantization_config": {"quant_method": "awq"}}
    args = engine.engine_args(Model("path", "quantized", config), A100)
    assert "quantization" not in args and "kv_cache_dtype" not in args


def test_flags_are_vllms():
    args = {"model": "p", "enforce_eager": True, "enable_prefix_caching": False, "max_num_seqs": 4}
    expected = ["--model", "p", "--enforce-eager", "--no-enable-prefix-caching", "--max-num-seqs", "4"]
    assert engine.as_flags(args) == expected


def test_what_the_user_has_set_stays(monkeypatch):
    variables = ("VLLM_NO_USAGE_STATS", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING")
    for name in (*variables, "TORCHDYNAMO_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setattr(engine, "versions", lambda: {"vllm-cpu": "0"})
    environment = engine.os.environ
    engine.prepare_environment(CPU, ranks=2)
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "7" and environment["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in environment
    for name in ("VLLM_NO_USAGE_STATS", "VLLM_CPU_OMP_THREADS_BIND", "TORCHDYNAMO_DISABLE"):
        monkeypatch.delenv(name)


def test_a_host_without_multicast_has_none_in_vllm_either(monkeypatch):
    monkeypatch.setattr(engine.os, "environ", {})
    engine.prepare_environment(H100)
    assert not engine.NO_MULTICAST.keys() & engine.os.environ.keys()  # nothing is turned off that the host has on
    engine.os.environ["NCCL_NVLS_ENABLE"] = "0"
    engine.prepare_environment(H100, ranks=8)
    assert engine.NO_MULTICAST.items() <= engine.os.environ.items()


def test_a_cpu_needs_the_cpu_build(monkeypatch):
    monkeypatch.setattr(engine, "versions", lambda: {"vllm": "0.24.0"})
    with pytest.raises(CannotRun, match="make install GPU=0"):
        engine.prepare_environment(CPU)
