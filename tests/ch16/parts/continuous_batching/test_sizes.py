"""Sizes fit the engine and each other."""

import pytest

from ch16.parts.continuous_batching.sizes import sizes_for
from common.gpu import Machine

CPU = Machine("cpu", "a CPU", 1, 2**40, 2, None, True, False)
H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", 1, 80 * 2**30, 16, (9, 0), True, True)


@pytest.mark.parametrize("machine", [CPU, H100])
@pytest.mark.parametrize("quick", [True, False])
def test_sizes_fit_together(machine, quick):
    sizes = sizes_for(machine, quick)
    traffic = sizes.traffic
    assert sizes.budget >= max(traffic.prompt + traffic.streams, sizes.prefill.batches[-1] * sizes.prefill.tokens)
    assert sizes.context <= sizes.max_model_len and sizes.load.requests % sizes.load.slots == 0
    assert max(traffic.streams, sizes.load.slots) <= sizes.decode.batches[-1] < sizes.budget
    assert traffic.every <= 100  # more than one of a hundred gaps is disturbed: P99 sees it
    assert traffic.prompts >= 3 and traffic.streams < min(traffic.budgets) < max(traffic.budgets) < traffic.prompt
