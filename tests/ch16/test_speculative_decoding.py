"""The loop: greedy answers token for token, sampled ones by their distribution, the cache after each pass. Engines in
turn, what is refused before anything slow, and the script on the real engine."""

import itertools
import math
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ch16 import speculative_decoding
from ch16.parts.speculative_decoding import engine
from ch16.parts.speculative_decoding.checks import load_tokenizer, sizes_for
from ch16.parts.speculative_decoding.drafts import (
    CachedModel,
    ModelDraft,
    NgramDraft,
    draw,
    first_layers,
    to_distributions,
)
from ch16.parts.speculative_decoding.waves import DecodedWave
from ch16.speculative_decoding import decode, main, measure_engine, residual, speculate, verify
from common import models
from common.cli import CannotRun
from common.gpu import detect
from tests.ch16.parts.speculative_decoding.tiny import VOCABULARY, generator, one_thread_each, prompt_of, tiny

PART = "ch16.parts.speculative_decoding"

one_thread = pytest.fixture(autouse=True)(one_thread_each)


@pytest.fixture(scope="module")
def target():
    return tiny(layers=3, seed=0)


@pytest.fixture(scope="module")
def drafts(target):
    """Some that are right at times, one that always is, one that nearly never is."""
    another = tiny(layers=1, seed=1)
    return {
        "n-gram": lambda: NgramDraft(VOCABULARY),
        "first layers": lambda: ModelDraft(first_layers(target, 2)),
        "itself": lambda: ModelDraft(target),
        "another": lambda: ModelDraft(another),
    }


def tokens_of(steps):
    return [token for step in steps for token in step.tokens]


# ---- greedy ----


@pytest.mark.parametrize("gamma", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", ["n-gram", "first layers", "itself", "another"])
def test_greedy_answers_are_those_of_plain_decoding(target, drafts, name, gamma):
    accepted = drafted = 0
    for seed, tokens_out in itertools.product(range(5), (1, 2, 23)):
        prompt = prompt_of(seed)
        plain = tokens_of(decode(CachedModel(target), prompt, tokens_out, generator()))
        steps = list(speculate(CachedModel(target), drafts[name](), prompt, tokens_out, gamma, generator()))
        assert tokens_of(steps) == plain and len(plain) == tokens_out
        assert all(1 <= len(step.tokens) <= step.drafted + 1 <= gamma + 1 for step in steps)
        accepted += sum(len(step.tokens) - 1 for step in steps)
        drafted += sum(step.drafted for step in steps)
    assert drafted > 0
    if name == "itself":
        assert accepted == drafted
    else:
        assert accepted < drafted, "the rejection was tested, too"
    if name in ("n-gram", "first layers"):
        assert accepted > 0


# ---- the cache ----


@pytest.mark.parametrize("name", ["n-gram", "first layers", "another"])
def test_the_cache_is_as_if_only_the_answer_had_been_computed(target, drafts, name):
    prompt, model = prompt_of(0), CachedModel(target)
    tokens = list(prompt)
    for step in speculate(model, drafts[name](), prompt, 20, 4, generator()):
        tokens += step.tokens
        fresh = CachedModel(target)
        fresh.distributions(tokens[:-1], 1)
        assert model.cache.get_seq_length() == len(tokens) - 1
        for kept, computed in zip(model.cache.layers, fresh.cache.layers, strict=True):
            torch.testing.assert_close(kept.keys, computed.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(kept.values, computed.values, atol=1e-4, rtol=1e-4)


def test_a_pass_computes_only_what_is_new(target, drafts, monkeypatch):
    lengths, forward = [], target.forward
    monkeypatch.setattr(
        target, "forward", lambda **inputs: lengths.append(inputs["input_ids"].shape[1]) or forward(**inputs)
    )
    steps = list(speculate(CachedModel(target), drafts["n-gram"](), prompt_of(0), 20, 4, generator()))
    assert lengths == [12 + steps[0].drafted, *(1 + step.drafted for step in steps[1:])]


# ---- sampled: chi-square on a vocabulary of four ----


class Table:
    """A model of four tokens: the next one depends on the last."""

    def __init__(self, seed):
        self.logits = 1.5 * torch.randn(4, 4, generator=generator(seed))

    def distributions(self, tokens, count):
        return to_distributions(self.logits[torch.tensor(tokens[-count:])], TEMPERATURE)

    def rollback(self, length):
        pass


class TableDraft(Table):
    """Another such model, as a draft."""

    def propose(self, tokens, gamma, rng):
        guess = []
        for _ in range(gamma):
            guess.append(draw(self.distributions([*tokens, *guess], 1)[0], rng))
        return guess, self.distributions([*tokens, *guess[:-1]], gamma) if guess else torch.empty(0, 4)


PROMPT, LENGTH, TEMPERATURE, SAMPLES = [0, 1, 2, 3, 0, 1], 3, 0.8, 4000


def chi_square(draft, seed=0):
    """Chi-square of the answers over what the target alone gives, as a number of standard deviations (about)."""
    target, rng = Table(seed=1), generator(seed)
    table = to_distributions(target.logits, TEMPERATURE)
    expected = {}
    for answer in itertools.product(range(4), repeat=LENGTH):
        path = itertools.pairwise([PROMPT[-1], *answer])
        expected[answer] = SAMPLES * math.prod(float(table[last, token]) for last, token in path)
    seen = dict.fromkeys(expected, 0)
    for _ in range(SAMPLES):
        seen[tuple(tokens_of(speculate(target, draft, PROMPT, LENGTH, 2, rng)))] += 1
    rare = [answer for answer, count in expected.items() if count < 5]  # too few for the test: counted as one
    cells = [(seen[answer], count) for answer, count in expected.items() if count >= 5]
    cells.append((sum(seen[answer] for answer in rare), sum(expected[answer] for answer in rare)))
    value = sum((count - of) ** 2 / of for count, of in cells)
    free = len(cells) - 1
    return ((value / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))  # Wilson and Hilferty, 1931


def draft_named(name):
    return NgramDraft(4) if name == "n-gram" else TableDraft(seed=2)


@pytest.mark.parametrize("name", ["n-gram", "model"])
def test_sampled_answers_have_the_targets_distribution(name):
    assert abs(chi_square(draft_named(name))) < 4


@pytest.mark.parametrize("name", ["n-gram", "model"])
def test_a_wrong_rule_fails_the_same_test(name, monkeypatch):
    """The mistake that is made most: to draw from the target's distribution after a rejection."""
    monkeypatch.setattr(speculative_decoding, "residual", lambda p, q: p)
    assert chi_square(draft_named(name)) > 8


def probabilities(size=5):
    weights = st.lists(st.integers(0, 9), min_size=size, max_size=size).filter(any)
    return weights.map(lambda of: torch.tensor(of, dtype=torch.float64) / sum(of))


@given(probabilities(), probabilities())
def test_what_is_kept_and_what_replaces_it_add_up_to_the_target(p, q):
    kept = torch.minimum(p, q)  # q(x) * min(1, p(x) / q(x))
    rest = residual(p, q)
    torch.testing.assert_close(kept + (1 - kept.sum()) * rest / rest.sum(), p)


@given(probabilities(), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 99))
def test_a_greedy_target_keeps_what_it_would_say(p, guess, seed):
    best = torch.tensor([3, 0, 0, 2, 4])
    of_target = torch.nn.functional.one_hot(best[: len(guess) + 1], 5).double()
    q = torch.stack([p + 0.01 for _ in guess]) if guess else torch.empty(0, 5)  # any token may have been drawn
    accepted, token = verify(of_target, q, guess, generator(seed))
    agreed = next((i for i, token in enumerate(guess) if token != best[i]), len(guess))
    assert (accepted, token) == (agreed, int(best[agreed]))


# ---- vLLM ----


def counters(drafts, accepted):
    return drafts, accepted, 0


def test_engines_are_compared_in_turn(monkeypatch):
    """A warm-up, then rates, costs, counts and answers of the same rounds."""
    sent, asked, readings = [], [], iter([counters(0, 0), counters(12, 24), counters(12, 24), counters(15, 30)])

    def wave(llm, requests, batch, tokens):
        sent.append((llm, batch))
        if llm == "plain":
            return DecodedWave([[1, 2], [3, 4]], [(0.4, [1] * batch), (0.4, [1] * batch), (2.2, [1] * batch)] * 4)
        if requests == [[9]]:
            return DecodedWave([[1, 2], [3, 4]], [(1.3, [3] * batch)] + [(1.5, [1] * batch)] * 9)
        return DecodedWave([[1, 2], [3, 5]], [(1.2, [3] * batch)] * 4)

    monkeypatch.setattr(engine, "batched", wave)
    monkeypatch.setattr(engine, "read_counters", lambda llm: next(readings))
    monkeypatch.setattr(engine, "logprob_gap", lambda *where: asked.append(where) or 0.03)
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
    monkeypatch.setattr(engine, "batched", lambda *_: DecodedWave([[1]], [(1.0, [1])] * 4))
    monkeypatch.setattr(engine, "read_counters", lambda llm: next(readings))
    sizes = replace(sizes_for(detect("cpu"), quick=True, tokens=None, gamma=2), rounds=3, batches=(1,))
    _, theory = measure_engine("plain", "fast", "EAGLE", 2, {"copying": [[7]]}, sizes)
    assert theory[0]["idle_cost"] == 1 and "predicted" not in theory[0], "no pass surely verified a draft"


def test_many_requests_at_once_have_rounds_of_their_own(monkeypatch):
    sent = []
    monkeypatch.setattr(engine, "batched", lambda llm, *what: sent.append(llm) or DecodedWave([[1]], [(1, [1])]))
    monkeypatch.setattr(engine, "read_counters", lambda llm: counters(0, 0))
    sizes = sizes_for(detect("cpu"), quick=True, tokens=None, gamma=2)
    sizes = replace(sizes, rounds=5, rounds_together=2, batches=(16,))
    rows, theory = measure_engine("plain", "fast", "n-gram", 2, {"copying": [[7]]}, sizes)
    assert sent == ["plain", "fast"] * (1 + 2) and rows[0]["batch"] == 16 and theory == []


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
    monkeypatch.setattr(f"{PART}.checks.load_tokenizer", lambda model: load_tokenizer(models.bundled()))
    with pytest.raises(CannotRun, match="their tokenizers do not match"):  # 512 tokens against 49,152
        call("--draft", "small")


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
