import time

import pytest

from common import gpu
from common.cli import CannotRun


class FakeNvml:
    """Three GPUs."""

    class NVMLError(Exception):
        pass

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


def test_cpu_machine():
    machine = gpu.detect("cpu")
    assert machine.device == "cpu" and machine.cores >= 1 and machine.memory_bytes > 2**30
    assert not machine.native_fp8 and machine.capability is None
    assert "unknown" in gpu.card(machine), "a CPU's limits are not known, and must not be guessed"


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
