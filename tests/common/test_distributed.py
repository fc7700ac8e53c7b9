import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import torchrun

WORKER = str(Path(__file__).with_name("distributed_worker.py"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_gloo_ranks_meet_and_part(ranks):
    done = torchrun(ranks, WORKER, "cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{ranks} ranks sum {ranks * (ranks + 1) // 2} on cpu"]


@pytest.mark.slow
def test_one_failing_rank_ends_all():
    done = torchrun(2, WORKER, "cpu", "fail")
    assert done.returncode != 0 and "rank 1 gives up" in done.stderr


def test_alone_without_torchrun():
    done = subprocess.run([sys.executable, WORKER, "cpu"], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "1 ranks sum 1 on cpu\n"), done.stderr[-2000:]


@pytest.mark.gpu
def test_nccl_one_rank_a_gpu():
    import torch

    ranks = torch.cuda.device_count()
    done = torchrun(ranks, WORKER, "cuda")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{ranks} ranks sum {ranks * (ranks + 1) // 2} on cuda"]


@pytest.mark.gpu
def test_more_ranks_than_gpus():
    import torch

    done = torchrun(torch.cuda.device_count() + 1, WORKER, "cuda")
    assert done.returncode != 0 and "has no GPU" in done.stderr
