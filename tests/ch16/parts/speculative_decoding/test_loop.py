"""Exactness: greedy answers token for token, sampled ones by their distribution; the cache after each step."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ch16.parts.speculative_decoding import loop
from ch16.parts.speculative_decoding.drafts import ModelDraft, NgramDraft, first_layers
from ch16.parts.speculative_decoding.loop import CachedModel, decode, residual, speculate, to_distributions, verify

VOCABULARY = 32


def tiny(layers, seed):
    """A Llama of random weights, wide enough apart that no two tokens tie in FP32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


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


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def prompt_of(seed, length=12):
    return torch.randint(VOCABULARY, (length,), generator=generator(seed)).tolist()


def tokens_of(steps):
    return [token for step in steps for token in step.tokens]


# ---- greedy ----


@pytest.mark.parametrize("gamma", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", ["n-gram", "first layers", "itself", "another"])
def test_greedy_answers_are_those_of_plain_decoding(target, drafts, name, gamma):
    accepted = drafted = 0
    for seed, tokens_out in itertools.product(range(5), (1, 2, 23)):
        prompt = prompt_of(seed)
        plain = tokens_of(decode(CachedModel(target), prompt, tokens_out, 0.0, generator()))
        steps = list(speculate(CachedModel(target), drafts[name](), prompt, tokens_out, gamma, 0.0, generator()))
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
    for step in speculate(model, drafts[name](), prompt, 20, 4, 0.0, generator()):
        tokens += step.tokens
        fresh = CachedModel(target)
        fresh.distributions(tokens[:-1], 1, 0.0)
        assert model.cache.get_seq_length() == len(tokens) - 1
        for ours, theirs in zip(model.cache.layers, fresh.cache.layers, strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=1e-4)


def test_a_pass_computes_only_what_is_new(target, drafts, monkeypatch):
    lengths, forward = [], target.forward
    monkeypatch.setattr(
        target, "forward", lambda **inputs: lengths.append(inputs["input_ids"].shape[1]) or forward(**inputs)
    )
    steps = list(speculate(CachedModel(target), drafts["n-gram"](), prompt_of(0), 20, 4, 0.0, generator()))
    assert lengths == [12 + steps[0].drafted, *(1 + step.drafted for step in steps[1:])]


def test_rollback_goes_no_further_than_asked(target):
    model = CachedModel(target)
    model.distributions([1, 2, 3, 4], 1, 0.0)
    for length, left in ((9, 4), (4, 4), (2, 2)):
        model.rollback(length)
        assert model.cache.get_seq_length() == left


# ---- sampled: chi-square on a vocabulary of four ----


class Table:
    """A model of four tokens: the next one depends on the last."""

    def __init__(self, seed):
        self.logits = 1.5 * torch.randn(4, 4, generator=generator(seed))

    def distributions(self, tokens, count, temperature):
        return to_distributions(self.logits[torch.tensor(tokens[-count:])], temperature)

    def rollback(self, length):
        pass


class TableDraft(Table):
    """Another such model, as a draft."""

    def propose(self, tokens, gamma, temperature, rng):
        guess = []
        for _ in range(gamma):
            guess.append(loop.draw(self.distributions([*tokens, *guess], 1, temperature)[0], rng))
        return guess, self.distributions([*tokens, *guess[:-1]], gamma, temperature) if guess else torch.empty(0, 4)


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
        seen[tuple(tokens_of(speculate(target, draft, PROMPT, LENGTH, 2, TEMPERATURE, rng)))] += 1
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
    monkeypatch.setattr(loop, "residual", lambda p, q: p)
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


def test_temperature():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert to_distributions(logits, 0).tolist() == [[0, 1, 0]]
    torch.testing.assert_close(to_distributions(logits, 2.0), torch.softmax(logits / 2, -1))
