import os
from importlib.machinery import ModuleSpec

import pytest

from ch16.parts.fp8_quant import precision


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
