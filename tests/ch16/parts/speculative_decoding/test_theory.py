"""Acceptance arithmetic, against sums over all that can happen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.speculative_decoding.theory import Counts, expected_tokens, speedup

RATES = st.floats(0, 1)
GAMMAS = st.integers(0, 12)


@given(RATES, GAMMAS)
def test_expected_tokens_against_all_outcomes(alpha, gamma):
    """Each number of accepted tokens by its probability, and the target's own token."""
    rejected = sum((accepted + 1) * alpha**accepted * (1 - alpha) for accepted in range(gamma))
    assert expected_tokens(alpha, gamma) == pytest.approx(rejected + (gamma + 1) * alpha**gamma)


def test_expected_tokens_of_the_paper():
    assert expected_tokens(0.8, 5) == pytest.approx(3.68928)  # (1 - 0.8^6) / 0.2
    assert expected_tokens(0, 7) == 1 and expected_tokens(1, 7) == 8
    for alpha, gamma in ((-0.1, 1), (1.1, 1), (0.5, -1)):
        with pytest.raises(ValueError):
            expected_tokens(alpha, gamma)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)).filter(lambda run: run[0] <= run[1]), min_size=1))
def test_alpha_counts_trials(runs):
    """A token is tried if all before it were accepted."""
    tried = [accepted > at for accepted, drafted in runs for at in range(drafted) if accepted >= at]
    accepted, complete = sum(a for a, _ in runs), sum(a == d for a, d in runs)
    counts = Counts(len(runs) + 3, len(runs), accepted, complete)
    assert counts.alpha == pytest.approx(sum(tried) / len(tried))
    assert counts.accepted_length == pytest.approx(1 + accepted / len(runs))
    assert counts.share == len(runs) / (len(runs) + 3)


def test_nothing_drafted():
    counts = Counts(10, 0, 0, 0)
    assert counts.alpha is None and counts.accepted_length is None and counts.share == 0


@given(RATES, st.integers(1, 12), st.floats(1, 4), st.floats(0, 1), st.floats(0.01, 1), st.floats(1, 4))
def test_speedup_is_tokens_over_time(alpha, gamma, verify, draft, share, idle):
    """A thousand passes, some with a draft, against plain steps for the same tokens."""
    drafts = 1000 * share
    tokens = drafts * expected_tokens(alpha, gamma) + (1000 - drafts)
    time = drafts * (verify + gamma * draft) + (1000 - drafts) * idle
    assert speedup(alpha, gamma, verify, draft, share, idle) == pytest.approx(tokens / time)


def test_speedup_of_the_paper():
    """Theorem 3.8: verifying costs a decode step, each pass has a draft."""
    assert speedup(0.8, 5, 1.0, 0.05) == pytest.approx(3.68928 / 1.25)
    assert speedup(0.0, 4, 1.0, 0.1) < 1 < speedup(0.2, 4, 1.0, 0.0)
