"""The loop measured on a tiny model: every row, what must be so on any machine."""

from functools import partial

import pytest

from ch16.parts.speculative_decoding.drafts import ModelDraft, first_layers
from ch16.parts.speculative_decoding.lab import (
    PLAIN,
    LoopConfig,
    draft_seconds,
    exact_rows,
    measure_drafts,
    pass_seconds,
)
from ch16.speculative_decoding import answer
from tests.ch16.parts.speculative_decoding.tiny import prompt_of, tiny

LOOP = partial(answer, tokens_out=12, seed=0)
TEXTS = {"copying": [prompt_of(0) * 2, prompt_of(1) * 2], "free": [prompt_of(2)]}


@pytest.fixture(scope="module")
def network():
    return tiny(layers=3, seed=0)


def test_all_drafts_are_measured(network):
    rows, gammas, theory = measure_drafts(LOOP, network, tiny(layers=1, seed=1), TEXTS, 2, (1, 2, 4))
    copying = [(row["how"], row["gamma"]) for row in rows if row["text"] == "copying"]
    layers = ("2 of 3 layers", 2)
    assert copying == [
        ("plain decoding", None),
        ("n-gram", 1),
        ("n-gram", 2),
        ("n-gram", 4),
        ("n-gram, temperature 1", 2),
        layers,
        ("smaller model", 2),
    ]
    assert [row["how"] for row in rows if row["text"] == "free"] == [
        "plain decoding",
        "n-gram",
        layers[0],
        "smaller model",
    ]
    for row in rows:
        requests = len(TEXTS[row["text"]])
        if row["how"].endswith("temperature 1"):
            assert "same" not in row, "drawn, not the same"
        else:
            assert row["same"] == f"{requests} of {requests}" and row["gap"] is None and row["precision"] == "FP32"
        assert 1 <= row["tokens_per_pass"] <= (row["gamma"] or 0) + 1 and row["tokens_per_s"] > 0
    assert [row["gamma"] for row in gammas] == [1, 2, 4] and sum("measured" in row["best"] for row in gammas) == 1
    assert len(theory) == 6 and all(row["length"] is None or row["length"] <= row["gamma"] + 1 for row in theory)


def test_in_fp32_answers_are_the_same(network):
    plain, ngram = exact_rows(LOOP, network, TEXTS["copying"], 3)
    assert plain["how"] == PLAIN.how and ngram["same"] == "2 of 2" and ngram["gap"] is None


def test_costs_are_of_passes_that_leave_no_trace(network):
    seconds = pass_seconds(network, TEXTS["copying"][0], (1, 4))
    assert set(seconds) == {0, 1, 4} and min(seconds.values()) > 0
    config = LoopConfig("first layers", lambda: ModelDraft(first_layers(network, 1)), 3)
    assert draft_seconds(config, TEXTS["copying"][0], network.device) > 0
