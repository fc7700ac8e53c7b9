"""One process a GPU: set-up and tear-down for 1 to 8 ranks.

The same script runs alone (`python3 script.py`: one rank) and under `torchrun --nproc-per-node N script.py`;
NCCL connects GPUs, gloo connects CPU processes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from common.cli import CannotRun


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int  # 0 .. world_size - 1
    world_size: int
    device: torch.device

    @property
    def backend(self) -> str:
        """What connects the ranks: "nccl" or "gloo"."""
        return dist.get_backend()

    def print(self, *values: object) -> None:
        """Print on rank 0 only: N ranks would say everything N times."""
        if self.rank == 0:
            print(*values, flush=True)


@contextmanager
def process_group(device: str = "cpu", timeout_s: float = 120.0) -> Iterator[Ranks]:
    """Join the process group of this run; leave it at the end, on errors too. CannotRun: fewer GPUs than ranks here.

    "cuda": NCCL, one GPU per rank; "cpu": gloo. A collective that a rank never joins fails after `timeout_s`.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise CannotRun(
                f"rank {rank} has no GPU: this host has {torch.cuda.device_count()}; "
                f"start torchrun with --nproc-per-node {max(1, torch.cuda.device_count())}"
            )
        torch.cuda.set_device(local_rank)
    own_device = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")

    # Without torchrun there is nobody to meet: an in-memory store makes a group of one, so that the same
    # collectives work (and cost nothing) in a single process.
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(
        backend="nccl" if device == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        device_id=own_device if device == "cuda" else None,
        **alone,
    )
    try:
        yield Ranks(rank, world_size, own_device)
        # Nobody leaves while another rank still needs an answer. Skipped after an error: the others may
        # be stuck in a collective that this rank will never join, and only its exit frees them.
        dist.barrier()
    finally:
        dist.destroy_process_group()
