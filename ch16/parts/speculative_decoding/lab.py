"""Our loop measured: each draft beside plain decoding, and what its passes cost."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
from tqdm import tqdm

from ch16.parts.speculative_decoding.drafts import CachedModel, ModelDraft, NgramDraft, first_layers
from ch16.parts.speculative_decoding.tables import gamma_rows, theory_row
from ch16.parts.speculative_decoding.texts import Texts
from ch16.parts.speculative_decoding.theory import Counts
from ch16.parts.speculative_decoding.waves import DecodedWave, LoopPass, TokenLists, compare, count, joined, timed
from common.timing import measure, measure_together

LAYERS_PART, LAYERS_GAMMA = 5 / 6, 2  # of the target as its own draft: with fewer layers almost no guess is right
TIMING = {"cuda": {"warmup": 3, "repeats": 10}, "cpu": {"warmup": 1, "repeats": 5}}  # of passes and drafts


@dataclass(frozen=True)
class LoopConfig:
    """How our loop decodes: plainly, or with a draft."""

    how: str
    draft: Callable[[], NgramDraft | ModelDraft] | None = None  # a new one for each request
    gamma: int | None = None
    temperature: float = 0.0


PLAIN = LoopConfig("plain decoding")
# The script's loop: the passes that answer one request, of (network, config, prompt).
Answer = Callable[[nn.Module, LoopConfig, Sequence[int]], Iterable[LoopPass]]


def ngram_drafts(network: nn.Module, gamma: int) -> LoopConfig:
    """Drafts that are looked up in the context."""
    return LoopConfig("n-gram", partial(NgramDraft, network.config.vocab_size), gamma)


def run_configs(
    answer: Answer, network: nn.Module, configs: Sequence[LoopConfig], requests: TokenLists
) -> tuple[dict[LoopConfig, DecodedWave], dict[LoopConfig, Counts]]:
    """Each request with each config, in turn, so that a busy machine disturbs all alike."""
    waves, passes = {config: [] for config in configs}, {config: [] for config in configs}
    turns = [(prompt, config) for prompt in requests for config in configs]
    for prompt, config in tqdm(turns, desc="our loop", leave=False, disable=None):
        wave, after_first = timed(answer(network, config, prompt))
        waves[config].append(wave)
        passes[config] += after_first
    return {config: joined(waves[config]) for config in configs}, {config: count(passes[config]) for config in configs}


def loop_rows(
    network: nn.Module, text: str, requests: TokenLists, waves: Mapping[LoopConfig, DecodedWave]
) -> list[dict]:
    """Rows of LOOP_COLUMNS, each beside plain decoding."""

    def gap(tokens: Sequence[int], first: int, second: int) -> float:
        p = CachedModel(network, temperature=1.0).distributions(tokens, 1)[0].log()
        return abs(float(p[first] - p[second]))

    plain, rows = waves[PLAIN], []
    for config, wave in waves.items():
        row = {"text": text, "how": config.how, "gamma": config.gamma, "tokens_per_s": wave.tokens_per_s}
        row |= {"precision": "FP32" if network.dtype == torch.float32 else "BF16"}
        row |= {"speedup": wave.tokens_per_s / plain.tokens_per_s, "tokens_per_pass": wave.tokens_per_pass}
        rows.append(row | (compare(requests, plain.answers, wave.answers, gap) if config.temperature == 0 else {}))
    return rows


def pass_seconds(network: nn.Module, prompt: Sequence[int], gammas: Sequence[int]) -> dict[int, float]:
    """Median seconds of a pass after `prompt`, by the drafted tokens it verifies; 0 is a decode step."""
    model = CachedModel(network)

    def one_pass(gamma: int) -> None:
        p = model.distributions([*prompt, *prompt[:gamma]], gamma + 1)
        int(p[-1].argmax())  # waits for the device
        model.rollback(len(prompt) - 1)

    works = {f"{gamma}": partial(one_pass, gamma) for gamma in (0, *gammas)}
    timings = measure_together(works, **TIMING[network.device.type])
    return {int(gamma): timing.median for gamma, timing in timings.items()}


def draft_seconds(config: LoopConfig, prompt: Sequence[int], device: torch.device) -> float:
    """Median seconds of a drafted token after `prompt`."""
    draft, rng = config.draft(), torch.Generator(device)
    proposal = measure(lambda: draft.propose(prompt, config.gamma, rng), **TIMING[device.type])
    return proposal.median / config.gamma


def measure_drafts(
    answer: Answer, network: nn.Module, smaller: nn.Module | None, texts: Texts, gamma: int, gammas: Sequence[int]
) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows of LOOP_COLUMNS, GAMMA_COLUMNS and THEORY_COLUMNS.

    Drafts are the n-grams, the target's own first layers, and the `smaller` model. On copying text n-grams try all
    `gammas`, of which `gamma` is one.
    """
    ngram = ngram_drafts(network, gamma)
    ngrams = [replace(ngram, gamma=tried) for tried in gammas]
    sampled = replace(ngram, how="n-gram, temperature 1", temperature=1.0)
    layers = network.config.num_hidden_layers
    kept = max(1, round(LAYERS_PART * layers))
    models = [LoopConfig(f"{kept} of {layers} layers", partial(ModelDraft, first_layers(network, kept)), LAYERS_GAMMA)]
    if smaller is not None:
        models.append(LoopConfig("smaller model", partial(ModelDraft, smaller), gamma))

    rows, theory = [], []
    seconds = pass_seconds(network, texts["copying"][0], sorted({*gammas, LAYERS_GAMMA}))
    costs = {drafted: taken / seconds[0] for drafted, taken in seconds.items() if drafted}
    for text, configs in (("copying", [PLAIN, *ngrams, sampled, *models]), ("free", [PLAIN, ngram, *models])):
        waves, counts = run_configs(answer, network, configs, texts[text])
        rows += loop_rows(network, text, texts[text], waves)
        speedups = {config: wave.tokens_per_s / waves[PLAIN].tokens_per_s for config, wave in waves.items()}
        for config in (ngram, *models):
            draft_cost = draft_seconds(config, texts[text][0], network.device) / seconds[0]
            row = theory_row(counts[config], config.gamma, costs[config.gamma], speedups[config], draft_cost)
            theory.append({"how": f"our loop, {config.how}", "text": text, **row})
        if text == "copying":
            by_gamma = gamma_rows({config.gamma: speedups[config] for config in ngrams}, counts[ngram], costs)
    return rows, by_gamma, theory


def exact_rows(answer: Answer, network: nn.Module, requests: TokenLists, gamma: int) -> list[dict]:
    """Rows of LOOP_COLUMNS in FP32, where no two tokens tie: n-grams on copying text. The network stays in FP32."""
    exact = network.float()
    waves, _ = run_configs(answer, exact, [PLAIN, ngram_drafts(exact, gamma)], requests)
    return loop_rows(exact, "copying", requests, waves)
