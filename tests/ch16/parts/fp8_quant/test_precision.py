import contextlib
import os
from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest
import torch
import torch.nn.functional as F

from ch16.parts.fp8_quant import precision
from ch16.parts.fp8_quant.precision import fast_bf16
from common.gpu import detect

WITHOUT = replace(detect("cpu"), native_bf16=False)
PRODUCTS = {
    "matmul": (lambda a, b: a @ b, [(8, 32), (32, 16)]),
    "linear": (lambda x, w, b: F.linear(x, w, bias=b), [(8, 32), (16, 32), (16,)]),
    "bmm": (lambda a, b: a.bmm(b), [(2, 8, 32), (2, 32, 4)]),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [(1, 2, 8, 16)] * 3),
}


@pytest.fixture
def nvidia(tmp_path, monkeypatch):
    """Two places with NVIDIA's packages, of which the second has a cuDNN."""
    spec = ModuleSpec("nvidia", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "first"), str(tmp_path / "second")]
    (tmp_path / "second" / "cudnn" / "lib").mkdir(parents=True)
    (tmp_path / "second" / "cudnn" / "lib" / "libcudnn.so.9").touch()
    monkeypatch.setattr(precision.importlib.util, "find_spec", {"nvidia": spec}.get)
    for name in ("CUDNN_HOME", "NVTE_NORM_FWD_USE_CUDNN"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    return tmp_path


def test_the_norm_runs_on_pytorchs_cudnn(nvidia):
    precision.use_cudnn()
    assert os.environ["NVTE_NORM_FWD_USE_CUDNN"] == "1" and os.environ["CUDNN_HOME"] == str(nvidia / "second" / "cudnn")


def test_what_a_user_has_chosen_stays(nvidia, monkeypatch):
    monkeypatch.setenv("CUDNN_HOME", "/mine")
    monkeypatch.setenv("NVTE_NORM_FWD_USE_CUDNN", "0")
    precision.use_cudnn()
    assert (os.environ["CUDNN_HOME"], os.environ["NVTE_NORM_FWD_USE_CUDNN"]) == ("/mine", "0")


def test_without_nvidias_packages_there_is_nothing_to_point_at(nvidia, monkeypatch):
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: None)
    precision.use_cudnn()
    assert "CUDNN_HOME" not in os.environ


# ---- BF16 products in FP32 are BF16 products ----


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_as_exact_as_bf16_can_be(name):
    product, shapes = PRODUCTS[name]
    torch.manual_seed(0)
    given = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    with fast_bf16(WITHOUT):
        found = product(*given)
    exact = product(*[x.double() for x in given])
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.to(torch.bfloat16)) or (found - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_other_types_and_machines_with_units_are_left_alone():
    x = torch.randn(4, 4)
    with fast_bf16(WITHOUT):
        assert (x @ x).dtype == torch.float32 and (x.bfloat16() + 1).dtype == torch.bfloat16
    assert isinstance(fast_bf16(replace(WITHOUT, native_bf16=True)), contextlib.nullcontext)
