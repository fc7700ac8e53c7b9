"""Sizes from flags, and work that does not fit."""

import argparse

import pytest

from ch16.parts.fp8_quant.layers import RECIPES
from ch16.parts.fp8_quant.sizes import Fp8Sizes, check_memory, sizes_from
from common import gpu
from common.cli import CannotRun
from common.gpu import Machine
from common.models import SHAPES, Model

CPU = Machine("cpu", "a CPU", 1, 16 << 30, 2, None, True, False)


def test_sizes():
    shapes = Fp8Sizes(hidden=64, heads=4, kv_heads=2).layer_shapes
    assert shapes == {"qkv_proj": (64, 128), "out_proj": (64, 64), "mlp_fc1": (64, 256), "mlp_fc2": (256, 64)}
    assert Fp8Sizes(64, 4, 2, layers=3).bf16_weight_bytes == 2 * 3 * (64 * 128 + 64 * 64 + 2 * 64 * 256)


@pytest.mark.parametrize(("tokens", "sequence"), [(256, 128), (1000, 1000), (7, 7)])
def test_every_token_asked_for_is_measured(tokens, sequence):
    flags = dict.fromkeys(("quick", "hidden_size", "num_heads", "num_layers", "eval_tokens"))
    sizes = sizes_from(argparse.Namespace(**flags, tokens=tokens, recipes=list(RECIPES)), CPU)
    assert (sizes.prefill, sizes.sequence) == (tokens, sequence)


def test_memory_that_is_not_there(monkeypatch):
    model = Model("p", "deepseek-coder-33b", SHAPES["deepseek-coder-33b"])
    monkeypatch.setattr(gpu.psutil, "virtual_memory", lambda: type("", (), {"available": 8 << 30}))
    with pytest.raises(CannotRun, match=r"GiB of memory are needed and 8 GiB are free"):
        check_memory(CPU, Fp8Sizes(64, 4, 2, 2), model)
    check_memory(CPU, Fp8Sizes(64, 4, 2, 2), Model("p", "tiny-llama", SHAPES["tiny-llama"]))
