"""Which modes a machine has."""

import pytest

from ch16.parts.continuous_batching.interference import CHUNKED, NONE, WHOLE, prefill_modes
from ch16.parts.continuous_batching.workload import Traffic
from common.gpu import Machine

TRAFFIC = Traffic(streams=3, tokens=20, prompt=60, every=5, budgets=(33, 13), rounds=1)
CPU = Machine("cpu", "a CPU", 1, 2**30, 3, None, True, False)
GPUS = Machine("cuda", "a GPU", 2, 2**30, 16, (9, 0), True, True)


@pytest.mark.parametrize(
    ("machine", "separate", "where"),
    [
        (CPU, True, ["3 cores"] * 4 + ["1 of 3 cores", "1 + 2 cores"]),
        (CPU, False, ["3 cores"] * 4),
        (GPUS, True, ["1 GPU"] * 4 + ["1 + 1 GPU"]),
        (GPUS, False, ["1 GPU"] * 4),
    ],
)
def test_the_modes_of_a_machine(machine, separate, where):
    found = prefill_modes(TRAFFIC, machine, separate)
    assert [mode.where for mode in found] == where
    assert [mode.name for mode in found][:4] == [NONE, WHOLE, CHUNKED, CHUNKED]
    assert len(set(found)) == len(found)
