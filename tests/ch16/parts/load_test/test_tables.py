from types import SimpleNamespace

import pytest

from ch16.parts.load_test.flags import sizes_for
from ch16.parts.load_test.tables import W1_PERCENT, capacity_row, claim


@pytest.mark.parametrize("machine", ["cpu", "cuda", "quick"])
def test_the_knee_of_the_trace_is_finer_than_the_claim_asks(machine):
    sizes = sizes_for(SimpleNamespace(device=machine), machine == "quick")
    assert 100 / 2**sizes.trace_refine < W1_PERCENT


@pytest.mark.parametrize(
    ("error", "knee", "kept", "verdict"),
    [
        (14.0, 4, 4, "holds"),
        (14.0, 4, 3.5, "holds"),
        (14.0, 4, 3.4, "fails"),
        (-16.0, 4, 4, "fails"),
        (1.0, 4, 0, "fails"),
        (1.0, 0, 0, "fails"),
    ],
)
def test_the_claim_asks_for_both(error, knee, kept, verdict):
    judged = claim([{}, capacity_row("full server", 100.0 + error, 100.0), capacity_row("knee", knee, kept)])
    assert judged.verdict == verdict and f"{error:+.1f}%" in judged.measured
