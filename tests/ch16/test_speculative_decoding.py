"""The claim, the crossover, what is refused before anything slow, and the script on the real engine."""

import sys
from dataclasses import replace

import pytest

from ch16 import speculative_decoding
from ch16.parts.speculative_decoding.drafts import load_tokenizer
from ch16.parts.speculative_decoding.waves import Wave
from ch16.speculative_decoding import (
    checked_texts,
    claim,
    context_needed,
    crossover,
    engine_settings,
    main,
    measure_engine,
    sizes_for,
    slower_where,
)
from common import models
from common.cli import CannotRun
from common.gpu import detect

PART = "ch16.parts.speculative_decoding"


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ({1: 2.0, 2: 1.5, 4: 1.1}, None),
        ({1: 2.0, 2: 1.0, 4: 0.9, 8: 0.8}, 4),
        ({1: 0.9, 2: 0.8}, 1),
        ({8: 0.7, 1: 0.99, 2: 1.2, 4: 0.9}, 4),  # in any order; a small batch that was slower by chance does not count
    ],
)
def test_the_crossover(speedups, expected):
    assert crossover([{"batch": batch, "speedup": ratio} for batch, ratio in speedups.items()]) == expected


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ({1: 2.0, 8: 0.9, 64: 0.8}, "from 8 requests at once"),
        ({1: 0.9, 8: 0.9, 64: 0.8}, "at every batch"),
        ({1: 2.0, 8: 0.9, 64: 1.1}, "at 8, not beyond"),
        ({1: 2.0, 8: 1.0, 64: 1.1}, "nowhere up to 64"),
    ],
)
def test_where_it_is_slower_is_said(speedups, expected):
    assert slower_where([{"batch": batch, "speedup": ratio} for batch, ratio in speedups.items()]) == expected


def rows_of(copying, free, how="n-gram"):
    ratios = {"copying": (copying, 0.9), "free": (free, 0.8)}
    return [
        {"how": how, "text": text, "batch": batch, "speedup": ratio, "same": "3 of 4", "gap": 0.02}
        for text, of_text in ratios.items()
        for batch, ratio in zip((1, 8), of_text, strict=True)
    ]


@pytest.mark.parametrize(
    ("copying", "free", "verdict"), [(1.31, 0.9, "holds"), (1.29, 2.0, "fails"), (3.0, 0.5, "holds")]
)
def test_the_claim_is_judged_on_copying_text(copying, free, verdict):
    rows = rows_of(copying, free) + rows_of(9.0, 9.0, how="EAGLE")
    found = claim(rows, [{"how": "vLLM, n-gram", "text": "copying", "ratio": 1.02}], target=1.3)
    assert found.verdict == verdict and f"{copying:.2f} times" in found.measured and f"{free:.2f} on" in found.measured
    slower = "copying from 8 requests at once, free " + ("at every batch" if free < 1 else "from 8")
    assert "3 of 4, the others part between tokens 0.02 apart" in found.measured
    assert "predicted 1.02" in found.measured and slower in found.measured


def counters(drafts, accepted):
    return {"drafts": drafts, "accepted": accepted, "complete": 0}


def test_engines_are_compared_in_turn(monkeypatch):
    """A warm-up, then rates, costs, counts and answers of the same rounds."""
    sent, asked, readings = [], [], iter([counters(0, 0), counters(12, 24), counters(12, 24), counters(15, 30)])

    def wave(llm, requests, batch, tokens):
        sent.append((llm, batch))
        if llm == "plain":
            return Wave([[1, 2], [3, 4]], [(0.4, [1] * batch), (0.4, [1] * batch), (2.2, [1] * batch)] * 4)
        if requests == [[9]]:
            return Wave([[1, 2], [3, 4]], [(1.3, [3] * batch)] + [(1.5, [1] * batch)] * 9)
        return Wave([[1, 2], [3, 5]], [(1.2, [3] * batch)] * 4)

    monkeypatch.setattr(speculative_decoding, "batched", wave)
    monkeypatch.setattr(speculative_decoding, "read_counters", lambda llm: next(readings))
    monkeypatch.setattr(speculative_decoding, "logprob_gap", lambda *where: asked.append(where) or 0.03)
    sizes = replace(sizes_for(detect("cpu"), quick=True, tokens=None, gamma=2), rounds=3, batches=(1,))
    rows, theory = measure_engine("plain", "fast", "n-gram", 2, {"copying": [[7], [8]], "free": [[9]]}, sizes)
    assert sent == [("plain", 1), ("fast", 1)] * 8
    copying, free = rows
    assert copying["speedup"] == pytest.approx(2.5) and copying["plain"] == pytest.approx(1)
    assert copying["speculative"] == pytest.approx(2.5)
    assert copying["share_percent"] == 100 and copying["length"] == 3 and copying["same"] == "1 of 2"
    assert asked[0] == ("plain", [8, 3], 4, 5) and copying["gap"] == 0.03
    assert theory[0]["verify_cost"] == pytest.approx(1.2) and theory[0]["how"] == "vLLM, n-gram"
    assert theory[1]["verify_cost"] == pytest.approx(1.3) and free["share_percent"] == 10
    assert [row["idle_cost"] for row in theory] == pytest.approx([1.5, 1.5])  # of the free text


def test_an_engine_that_always_drafts_has_no_pass_without(monkeypatch):
    readings = iter([counters(0, 0), counters(12, 12)])
    monkeypatch.setattr(speculative_decoding, "batched", lambda *_: Wave([[1]], [(1.0, [1])] * 4))
    monkeypatch.setattr(speculative_decoding, "read_counters", lambda llm: next(readings))
    sizes = replace(sizes_for(detect("cpu"), quick=True, tokens=None, gamma=2), rounds=3, batches=(1,))
    _, theory = measure_engine("plain", "fast", "EAGLE", 2, {"copying": [[7]]}, sizes)
    assert theory[0]["idle_cost"] == 1 and "predicted" not in theory[0], "no pass surely verified a draft"


def test_many_requests_at_once_have_rounds_of_their_own(monkeypatch):
    sent = []
    monkeypatch.setattr(speculative_decoding, "batched", lambda llm, *what: sent.append(llm) or Wave([[1]], [(1, [1])]))
    monkeypatch.setattr(speculative_decoding, "read_counters", lambda llm: counters(0, 0))
    sizes = sizes_for(detect("cpu"), quick=True, tokens=None, gamma=2)
    sizes = replace(sizes, rounds=5, rounds_together=2, batches=(16,))
    rows, theory = measure_engine("plain", "fast", "n-gram", 2, {"copying": [[7]]}, sizes)
    assert sent == ["plain", "fast"] * (1 + 2) and rows[0]["batch"] == 16 and theory == []


def test_two_engines_must_fit(monkeypatch):
    machine = replace(detect("cpu"), device="cuda", count=1, memory_bytes=80 * 10**9)
    large = models.dummy("deepseek-coder-33b")
    with pytest.raises(CannotRun, match="two engines of deepseek-coder-33b share a GPU here"):
        engine_settings(large, machine, 512, 8)
    settings = engine_settings(models.dummy("llama-3-8b"), machine, 512, 8)
    assert settings["gpu_memory_utilization"] == 0.45 and "quantization" not in settings


def test_nothing_accepted_is_no_crash():
    theory = [{"how": "vLLM, n-gram", "text": "copying"}]
    assert "measured over predicted n/a" in claim(rows_of(1.0, 1.0), theory, 1.3).measured


def test_the_chosen_gamma_is_tried_and_tokens_are_taken():
    sizes = sizes_for(detect("cpu"), quick=True, tokens=None, gamma=6)
    assert sizes.gammas == (1, 4, 6, 8) and (sizes.loop_tokens, sizes.tokens) == (24, 24)
    longer = sizes_for(detect("cpu"), quick=True, tokens=None, gamma=25)
    assert (longer.loop_tokens, longer.tokens) == (27, 27), "a draft of 25 fits into the answer"
    assert sizes_for(detect("cpu"), quick=False, tokens=None, gamma=100).tokens == 102
    assert sizes_for(detect("cpu"), quick=False, tokens=77, gamma=4).loop_tokens == 77


# ---- what is refused ----


@pytest.fixture
def call(monkeypatch):
    """main() with these flags, in this process; whatever is slow must not be reached."""
    for name in ("quiet", "prepare_environment"):
        monkeypatch.setattr(speculative_decoding, name, lambda *_: None)
    for name in ("load_model", "start_engine"):
        monkeypatch.setattr(speculative_decoding, name, lambda *_: pytest.fail("slow work was started"))

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["speculative_decoding.py", "--device", "cpu", "--quick", *flags])
        main()

    return call


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gamma", "0"), "argument --gamma: must be at least 1, not 0"),
        (("--gamma", "7", "--tokens", "8"), "--tokens must be at least 9"),
        (("--dummy-weights", "tiny-llama"), "speculation needs a real model"),
    ],
)
def test_usage_errors(call, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        call(*flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tokens", "8100"), r"need 8,\d\d\d tokens of context, and there is room for 8,192"),
        (("--eagle", "bundled"), "no EAGLE head"),
        (("--draft", "nowhere"), "no model 'nowhere'"),
        (("--eagle", "nowhere"), "no model 'nowhere'"),
    ],
)
def test_what_cannot_run_is_one_line(call, flags, message):
    with pytest.raises(CannotRun, match=message) as stopped:
        call(*flags)
    assert "\n" not in str(stopped.value)


def test_a_draft_that_does_not_fit_is_refused(call, monkeypatch):
    shape = models.dummy("tiny-llama")
    monkeypatch.setattr(models, "resolve", lambda name, machine: shape if name == "small" else models.bundled())
    monkeypatch.setattr(f"{PART}.drafts.load_tokenizer", lambda model: load_tokenizer(models.bundled()))
    with pytest.raises(CannotRun, match="their tokenizers do not match"):  # 512 tokens against 49,152
        call("--draft", "small")


def test_there_is_room_for_prompt_answer_and_draft():
    sizes = sizes_for(detect("cpu"), quick=True, tokens=None, gamma=4)
    texts = checked_texts(models.bundled(), None, sizes)
    assert {name: len(of_text) for name, of_text in texts.items()} == {"copying": 2, "free": 2}
    assert context_needed(texts, sizes) == max(map(len, texts["copying"])) + 24 + 8


# ---- the script ----


@pytest.mark.slow
def test_the_script(quick_run):
    """On two real engines. No time is asserted: only what must be so on any machine."""
    done = quick_run("python3", "ch16/speculative_decoding.py", "--quick")
    assert done.status == 0, done.err[-3000:]
    tables = {name: table["rows"] for name, table in done.json["tables"].items()}
    exact = [row for row in tables["loop"] if row["precision"] == "FP32"]
    assert {"plain decoding", "n-gram"} <= {row["how"] for row in exact}  # and the others, without units for BF16
    greedy = [row for row in exact if "same" in row]
    assert all(row["same"] == "1 of 1" and row["gap"] is None for row in greedy), "token for token"
    copied = [row for row in tables["loop"] if row["text"] == "copying" and row["how"] == "n-gram"]
    assert all(row["tokens_per_pass"] > 1.2 for row in copied)

    assert {(row["text"], row["batch"]) for row in tables["batches"]} == {
        (text, batch) for text in ("copying", "free") for batch in (1, 16)
    }
    of_vllm = {row["text"]: row for row in tables["theory"] if row["how"] == "vLLM, n-gram"}
    assert of_vllm["copying"]["alpha"] > of_vllm["free"]["alpha"]
    assert of_vllm["copying"]["share_percent"] > of_vllm["free"]["share_percent"]
    assert 1 < of_vllm["copying"]["length"] <= 5, "gamma drafted tokens, and the target's own"
    assert all(row["gap"] is None or row["gap"] < 0.5 for row in tables["batches"]), "rounding, not another answer"
    (d1,) = done.json["claims"]
    assert d1["claim"] == "D1" and d1["verdict"] in ("holds", "fails")
