"""Expert parallelism: N processes give what one gives, also where ranks get nothing."""

from pathlib import Path

import pytest
import torch

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
