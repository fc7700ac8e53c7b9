"""What is counted of a wave, and how answers are compared."""

import pytest

from ch16.parts.speculative_decoding.theory import Counts
from ch16.parts.speculative_decoding.waves import DecodedWave, compare, count, joined, timed


def test_a_wave_counts_tokens_passes_and_seconds():
    wave = DecodedWave([[1], [2]], [(0.5, [1, 1]), (1.0, [3, 1]), (0.5, [2])])
    assert wave.tokens_per_s == 8 / 2 and wave.passes == 5 and wave.tokens_per_pass == 8 / 5
    assert (
        wave.step_seconds() == pytest.approx(2 / 3)
        and wave.step_seconds(gave_more=True) == 0.75
        and wave.step_seconds(gave_more=False) == 0.5
    )
    assert DecodedWave([[1]], [(0.5, [1])]).step_seconds(gave_more=True) is None
    wave = joined([wave, DecodedWave([[3]], [(2.0, [4])])])
    assert wave.answers == [[1], [2], [3]] and wave.tokens_per_s == 12 / 4


def test_the_first_step_holds_the_prefill_and_is_not_timed():
    wave, passes = timed([([1, 2], 3), ([3], 2), ([4, 5], 1)])
    assert wave.answers == [[1, 2, 3, 4, 5]] and [new for _, new in wave.steps] == [[1], [2]]
    assert passes == [([3], 2), ([4, 5], 1)] and min(seconds for seconds, _ in wave.steps) >= 0


def test_drafts_are_counted_as_vllm_does():
    passes = [([1], 0), ([1], 2), ([1, 2], 2), ([1, 2, 3], 2), ([1, 2], 1)]
    assert count(passes) == Counts(steps=5, drafts=4, accepted=4, complete=2)


def test_answers_are_compared_where_they_part():
    asked = []

    def gap(*where):
        asked.append(where)
        return 0.1 * len(asked)

    prompts, plain = [[10], [11]], [[1, 2, 3], [4, 5, 6], [7, 8]]
    assert compare(prompts, plain, plain, gap) == {"same": "3 of 3", "gap": None} and not asked
    found = compare(prompts, plain, [[1, 2, 3], [4, 9, 6], [5, 8]], gap)
    assert found == {"same": "1 of 3", "gap": pytest.approx(0.2)}
    assert asked == [([11, 4], 5, 9), ([10], 7, 5)], "two prompts for three answers"
