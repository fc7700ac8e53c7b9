import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.moe_benchmark.plain import arrange, sort_rows


@given(st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=30))
def test_rows_are_sorted_by_expert_and_stay_in_order(chosen):
    experts = torch.tensor(chosen)
    places, ends = sort_rows(experts, 7)
    flat, order = experts.flatten().tolist(), places.flatten().tolist()
    expected = sorted(range(len(flat)), key=lambda row: (flat[row], row))
    assert [order.index(place) for place in range(len(flat))] == expected
    assert ends.tolist() == [sum(e <= expert for e in flat) for expert in range(7)]


def test_no_fp8_without_a_gpu():
    with pytest.raises(ValueError, match="on GPUs alone"):
        arrange(torch.ones(1, 8), torch.zeros(1, 1, dtype=torch.int64), fp8=True)
