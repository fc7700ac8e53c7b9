"""What torch has to be told of a machine's devices."""

import torch

from common.gpu import Machine


def torch_dtype(machine: Machine) -> torch.dtype:
    """`Machine.dtype` as torch has it."""
    return getattr(torch, machine.dtype)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was given; a CPU has already.

    GPU work is asynchronous: a host that does not wait sees it begun, not done.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
