"""Run under torchrun by test_parallel.py: a layer spread over ranks against the same layer on one."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

import torch

from ch16.moe_benchmark import grouped
from ch16.parts.moe_benchmark.experts import Experts, ExpertSizes, Routing
from ch16.parts.moe_benchmark.parallel import ExpertParallel, measure_parallel
from ch16.parts.moe_benchmark.routing import PATTERNS, make_routing
from common.distributed import process_group

device = sys.argv[1]
with torch.no_grad(), process_group(device, timeout_s=60) as ranks:
    cases = [(pattern, gated) for pattern in (*PATTERNS, "first") for gated in (False, True)]
    for pattern, gated in cases:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        experts = Experts.random(ExpertSizes(64, 32, 8, gated), ranks.device.type, dtype)
        share = 8 // ranks.world_size
        layer = ExpertParallel(experts.part(ranks.rank * share, share), ranks, grouped)
        torch.manual_seed(1 + ranks.rank)  # other tokens on every rank
        tokens = 5 + 3 * ranks.rank  # ranks need not have equally many
        x = torch.randn(tokens, 64, device=ranks.device, dtype=dtype)
        if pattern == "first":  # all rows to rank 0, the others get none
            routing = Routing(torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1))
        else:
            routing = make_routing(pattern, tokens, 8, 2, seed=ranks.rank)
        routing = Routing(routing.experts.to(ranks.device), routing.weights.to(ranks.device))
        limit = 2e-2 if device == "cuda" else 1e-5
        assert torch.allclose(layer(x, routing), grouped(x, experts, routing), rtol=limit, atol=limit), pattern
    seconds = measure_parallel(layer, {"a": (x, routing), "b": (x, routing)}, repeats=3)
    assert set(seconds) == {"a", "b"}
    for found in seconds.values():
        assert found["step"] > 0 and found["imbalance"] >= 0 and found["exchange"] > 0
        assert abs(found["step"] - sum(found[part] for part in found if part not in ("step", "spread"))) < 1e-9
    ranks.print(f"{ranks.world_size} ranks equal one in {len(cases)} cases, and in time")
