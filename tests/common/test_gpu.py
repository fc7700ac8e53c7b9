import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest

from common import gpu
from common.cli import CannotRun


class FakeNvml:
    """Three GPUs, with 80 GiB each or what `memory` raises."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    memory: Exception | None = None

    def nvmlInit(self):
        pass

    def nvmlDeviceGetName(self, handle):
        return "NVIDIA Imaginary 1"

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return [12, 1]

    def nvmlDeviceGetMemoryInfo(self, handle):
        if self.memory:
            raise self.memory
        return SimpleNamespace(total=80 << 30)

    def nvmlDeviceGetUtilizationRates(self, handle):
        raise self.NVMLError_NotSupported

    def nvmlDeviceGetCount(self):
        return 3

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "GPU-two":
            raise self.NVMLError
        return 2


@pytest.mark.parametrize(
    ("listed", "handles"),
    [(None, [0, 1, 2]), ("", []), ("1", [1]), ("2,0", [2, 0]), ("GPU-two,1", [2, 1]), ("0,7,1", [0]), ("x", [])],
)
def test_visible_devices_as_in_cuda(monkeypatch, listed, handles):
    if listed is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert gpu.visible_handles(FakeNvml()) == handles


def test_names_of_a_part_of_the_gpus(monkeypatch):
    machine = gpu.Machine("cuda", "a GPU", 3, 80 * 2**30, 8, (9, 0), True, True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 5,GPU-abc,7")
    assert gpu.device_names(machine) == ["4", "5", "GPU-abc"]  # the last one is not there
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpu.device_names(machine) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("device", "native", "dtype", "itemsize"),
    [
        ("cpu", True, "bfloat16", 2),
        ("cpu", False, "float32", 4),
        ("cuda", True, "bfloat16", 2),
        ("cuda", False, "float16", 2),
    ],
)
def test_models_compute_in_what_the_machine_has_units_for(device, native, dtype, itemsize):
    machine = gpu.Machine(device, "one", 1, 2**34, 2, None, native_bf16=native, native_fp8=False)
    assert (machine.dtype, machine.itemsize) == (dtype, itemsize) and dtype in gpu.DTYPE_NAMES


def test_cpu_machine():
    machine = gpu.detect("cpu")
    assert machine.device == "cpu" and machine.cores >= 1 and machine.memory_bytes > 2**30
    assert not machine.native_fp8 and machine.capability is None
    assert "unknown" in gpu.card(machine), "a CPU's limits are not known, and must not be guessed"


@pytest.fixture
def nvml(monkeypatch):
    """A machine with the GPU stack and three GPUs."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(gpu, "versions", lambda: {"torch": "2.11.0"})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_gpus_as_nvml_says(nvml):
    machine = gpu.detect()
    assert (machine.device, machine.count, machine.memory_bytes) == ("cuda", 3, 80 << 30) and machine.native_fp8


def test_a_gpu_without_memory_of_its_own_has_the_ram(nvml):
    nvml.memory = nvml.NVMLError_NotSupported("Not Supported")
    assert gpu.detect().memory_bytes == psutil.virtual_memory().total


@pytest.mark.parametrize("refuses", ["nvmlDeviceGetCount", "nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo"])
def test_a_driver_that_refuses_is_one_line(nvml, monkeypatch, refuses):
    def refuse(*_):
        raise nvml.NVMLError("Insufficient Permissions")

    monkeypatch.setattr(nvml, refuses, refuse)
    with pytest.raises(CannotRun, match="the NVIDIA driver does not answer: Insufficient Permissions"):
        gpu.detect()
    assert gpu.detect("cpu").device == "cpu"
    monkeypatch.setattr(gpu, "versions", lambda: {"torch": "2.13.0+cpu"})
    assert gpu.detect().device == "cpu"  # the CPU stack has no need to ask


@pytest.mark.parametrize("refuses", ["nvmlDeviceGetCount", "nvmlDeviceGetUtilizationRates"])
def test_a_gpu_that_says_nothing_of_its_utilization(nvml, monkeypatch, refuses):
    machine, errors, asked = gpu.detect(), [], threading.Event()

    def refuse(*_):
        asked.set()
        raise nvml.NVMLError("Not Supported")

    monkeypatch.setattr(nvml, refuses, refuse)
    monkeypatch.setattr(threading, "excepthook", errors.append)
    with gpu.UtilizationSampler(machine, interval_s=0.001) as sampler:
        assert asked.wait(30)
    assert sampler.mean is None and not errors


def test_asking_for_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(gpu, "_gpus", list)
    monkeypatch.setattr(gpu, "versions", lambda: {"torch": "2.11.0"})
    with pytest.raises(CannotRun, match="no GPU found"):
        gpu.detect("cuda")
    assert gpu.detect("auto").device == "cpu"


def test_the_cpu_stack_does_not_use_the_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "_gpus", lambda: [gpu.Machine("cuda", "a GPU", 1, 1, 1, (9, 0), True, True)])
    monkeypatch.setattr(gpu, "versions", lambda: {"torch": "2.13.0+cpu"})
    assert gpu.detect("auto").device == "cpu"
    with pytest.raises(CannotRun, match="make install GPU=1"):
        gpu.detect("cuda")


def test_unknown_gpu_has_unknown_limits():
    machine = gpu.Machine("cuda", "NVIDIA Imaginary 1", 2, 80 << 30, 8, (9, 0), True, True)
    assert "unknown TFLOP/s BF16" in gpu.card(machine)
    assert set(machine.as_dict()["peak"].values()) == {None}


def test_no_utilization_without_a_gpu():
    with gpu.UtilizationSampler(gpu.detect("cpu")) as sampler:
        time.sleep(0.01)
    assert sampler.mean is None


@pytest.mark.gpu
def test_gpu_machine_agrees_with_torch():
    import torch

    machine = gpu.detect("cuda")
    properties = torch.cuda.get_device_properties(0)
    assert machine.name == properties.name and machine.count == torch.cuda.device_count()
    assert machine.capability == (properties.major, properties.minor)
    assert machine.memory_bytes == pytest.approx(properties.total_memory, rel=0.05)


@pytest.mark.gpu
def test_utilization_of_a_busy_gpu():
    import torch

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    with gpu.UtilizationSampler(gpu.detect("cuda")) as sampler:
        for _ in range(2000):
            a @ a
        torch.cuda.synchronize()
    assert sampler.mean > 30
