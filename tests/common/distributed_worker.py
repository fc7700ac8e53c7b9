"""Run under torchrun by test_distributed.py: sum the ranks, let rank 0 print."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from common.distributed import process_group

device = sys.argv[1]
with process_group(device, timeout_s=60) as ranks:
    total = torch.tensor([float(ranks.rank + 1)], device=ranks.device)
    dist.all_reduce(total)
    ranks.print(f"{ranks.world_size} ranks sum {total.item():.0f} on {ranks.device.type}")
    if sys.argv[2:] == ["fail"] and ranks.rank == 1:
        raise RuntimeError("rank 1 gives up")
assert not dist.is_initialized()
