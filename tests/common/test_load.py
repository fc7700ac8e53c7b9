import pytest

from common import load


def test_figures_by_hand():
    """Two requests sent at 0 and 1 s; tokens at 2, 3, 5 s and at 4, 4.5, 6 s."""
    row = load.summarise([0.0, 1.0], [[2.0, 3.0, 5.0], [4.0, 4.5, 6.0]], gpus=2)
    assert row["concurrency"] == 2
    assert row["tokens_per_s"] == pytest.approx(6 / 6.0) and row["tokens_per_s_gpu"] == pytest.approx(0.5)
    assert row["ttft_p50_ms"] == pytest.approx(2500)  # 2 and 3 s
    assert row["tpot_p50_ms"] == pytest.approx(1250)  # (5-2)/2 and (6-4)/2
    assert row["itl_p99_ms"] == pytest.approx(1985)  # of 1, 2, 0.5, 1.5
    assert row["e2e_p99_ms"] == pytest.approx(5000)
    timed = {f"{name}_{p}_ms" for name in ("ttft", "tpot", "itl", "e2e") for p in ("p50", "p99")}
    assert row.keys() == {"concurrency", "tokens_per_s", "tokens_per_s_gpu"} | timed


def test_a_single_token_has_no_tpot():
    with pytest.raises(ValueError):
        load.summarise([0.0], [[1.0]], gpus=1)


def test_random_prompts_are_reproducible_and_share_nothing():
    prompts = load.random_prompts(8, 16, 1000, seed=3)
    assert prompts == load.random_prompts(8, 16, 1000, seed=3)
    assert len({tuple(p) for p in prompts}) == 8 and all(0 <= t < 1000 for p in prompts for t in p)
