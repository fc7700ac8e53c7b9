"""Expert parallelism: N processes give what one gives, also where ranks get nothing."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ch16.moe_benchmark import grouped
from ch16.parts.moe_benchmark.experts import Experts, ExpertSizes, Routing
from ch16.parts.moe_benchmark.parallel import rank_part
from ch16.parts.moe_benchmark.routing import PATTERNS, make_routing
from common.cli import CannotRun
from tests.ranks import torchrun

WORKER = str(Path(__file__).with_name("parallel_worker.py"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_many_processes_equal_one(ranks):
    done = torchrun(ranks, WORKER, "cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{ranks} ranks equal one in 10 cases, and in time"]


@pytest.mark.gpu
def test_on_gpus():
    done = torchrun(torch.cuda.device_count(), WORKER, "cuda")
    assert done.returncode == 0, done.stderr[-3000:]


@given(st.sampled_from(PATTERNS), st.sampled_from([1, 2, 4, 8]), st.integers(1, 40))
def test_parts_of_all_ranks_add_up_to_the_layer(pattern, ranks, tokens):
    torch.manual_seed(tokens)
    experts = Experts.random(ExpertSizes(16, 8, 8, gated=True), dtype=torch.float32)
    x, routing = torch.randn(tokens, 16), make_routing(pattern, tokens, 8, 3, seed=tokens)
    total, rows = torch.zeros(tokens, 16), 0
    for rank in range(ranks):
        owner, local = rank_part(routing, 8, rank, ranks)
        shard = experts.part(rank * 8 // ranks, 8 // ranks)
        rows += len(owner)
        if len(owner):
            global_expert = local.experts + rank * 8 // ranks
            weight = (routing.weights[owner] * (routing.experts[owner] == global_expert)).sum(1, keepdim=True)
            total.index_add_(0, owner, weight * grouped(x[owner], shard, local))
    assert rows == tokens * 3 and torch.allclose(total, grouped(x, experts, routing), atol=1e-5)


def test_ranks_must_divide():
    with pytest.raises(CannotRun, match="8 experts do not divide by 3 ranks"):
        rank_part(Routing(torch.zeros(1, 1).long(), torch.ones(1, 1)), 8, 0, 3)
