"""Our loop measured: each draft beside plain decoding, and what its passes cost."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from tqdm import tqdm

from ch16.parts.speculative_decoding.drafts import ModelDraft, NgramDraft, first_layers
from ch16.parts.speculative_decoding.loop import CachedModel, Draft, Step, decode, speculate
from ch16.parts.speculative_decoding.theory import Counts, best_gamma, speedup, theory_row
from ch16.parts.speculative_decoding.waves import Wave, compare, count, timed
from common.results import Column
from common.timing import measure, measure_together

LAYERS_PART, LAYERS_GAMMA = 5 / 6, 2  # of the target as its own draft: fewer layers guess next to nothing
TIMING = {"cuda": {"warmup": 3, "repeats": 10}, "cpu": {"warmup": 1, "repeats": 5}}  # of passes and drafts

LOOP_COLUMNS = (
    Column("text", "text"),
    Column("how", "draft"),
    Column("precision", "precision"),
    Column("gamma", "gamma", "d"),
    Column("tokens_per_s", "tok/s", ",.1f"),
    Column("speedup", "speed-up", ".2f"),
    Column("tokens_per_pass", "tokens a pass", ".2f"),
    Column("same", "same answers"),
    Column("gap", "gap", ".3f"),
)
GAMMA_COLUMNS = (
    Column("gamma", "gamma", "d"),
    Column("verify_cost", "verify, in decode steps", ".2f"),
    Column("predicted", "speed-up predicted", ".2f"),
    Column("speedup", "measured", ".2f"),
    Column("best", ""),
)


@dataclass(frozen=True)
class Way:
    """A way to decode: plainly, or with a draft."""

    how: str
    draft: Callable[[], Draft] | None = None  # a new one for each request
    gamma: int | None = None
    temperature: float = 0.0

    def answer(self, network: nn.Module, prompt: Sequence[int], tokens_out: int, seed: int) -> Iterator[Step]:
        """The steps that answer one request."""
        rng, target = torch.Generator(network.device).manual_seed(seed), CachedModel(network)
        if self.draft is None:
            return decode(target, prompt, tokens_out, self.temperature, rng)
        return speculate(target, self.draft(), prompt, tokens_out, self.gamma, self.temperature, rng)


PLAIN = Way("plain decoding")


def ngram_way(network: nn.Module, gamma: int) -> Way:
    """Decoding with drafts that are looked up in the context."""
    return Way("n-gram", lambda: NgramDraft(network.config.vocab_size), gamma)


def run_ways(
    network: nn.Module, ways: Sequence[Way], requests: Sequence[Sequence[int]], tokens_out: int, seed: int
) -> tuple[dict[Way, Wave], dict[Way, Counts]]:
    """Each request in each way, in turn, so that a busy machine disturbs all alike."""
    waves, steps = {way: Wave() for way in ways}, {way: [] for way in ways}
    for prompt in tqdm(requests, desc="our loop", leave=False, disable=not sys.stderr.isatty()):
        for way in ways:
            wave, after_first = timed(way.answer(network, prompt, tokens_out, seed))
            waves[way] += wave
            steps[way] += after_first
    return waves, {way: count(steps[way]) for way in ways}


def loop_rows(
    network: nn.Module, text: str, requests: Sequence[Sequence[int]], waves: Mapping[Way, Wave]
) -> list[dict]:
    """Rows of LOOP_COLUMNS, each beside plain decoding."""

    def gap(i: int, begun: Sequence[int], one: int, other: int) -> float:
        p = CachedModel(network).distributions([*requests[i], *begun], 1, temperature=1.0)[0].log()
        return abs(float(p[one] - p[other]))

    plain, rows = waves[PLAIN], []
    for way, wave in waves.items():
        row = {"text": text, "how": way.how, "gamma": way.gamma, "tokens_per_s": wave.tokens_per_s}
        row |= {"precision": "FP32" if network.dtype == torch.float32 else "BF16"}
        row |= {"speedup": wave.tokens_per_s / plain.tokens_per_s, "tokens_per_pass": wave.tokens_per_pass}
        rows.append(row | (compare(plain.answers, wave.answers, gap) if way.temperature == 0 else {}))
    return rows


def pass_seconds(network: nn.Module, prompt: Sequence[int], gammas: Sequence[int]) -> dict[int, float]:
    """Median seconds of a pass after `prompt` that verifies so many drafted tokens; 0 is a decode step."""
    model = CachedModel(network)

    def one_pass(gamma: int) -> None:
        p = model.distributions([*prompt, *prompt[:gamma]], gamma + 1, temperature=0)
        int(p[-1].argmax())  # waits for the device
        model.rollback(len(prompt) - 1)

    works = {f"{gamma}": lambda gamma=gamma: one_pass(gamma) for gamma in (0, *gammas)}
    timings = measure_together(works, **TIMING[network.device.type])
    return {int(gamma): timing.median for gamma, timing in timings.items()}


def draft_seconds(way: Way, prompt: Sequence[int], device: torch.device) -> float:
    """Median seconds of a drafted token after `prompt`."""
    draft, rng = way.draft(), torch.Generator(device)
    proposal = measure(lambda: draft.propose(prompt, way.gamma, 0.0, rng), **TIMING[device.type])
    return proposal.median / way.gamma


def gamma_rows(measured: Mapping[int, float], counts: Counts, verify_costs: Mapping[int, float]) -> list[dict]:
    """Rows of GAMMA_COLUMNS: what the counts of one gamma make expect of all, beside the speed-ups `measured`."""
    costs = {gamma: verify_costs[gamma] for gamma in measured}
    marks = {max(measured, key=measured.get): ["best measured"]}
    if counts.alpha is not None:
        marks.setdefault(best_gamma(counts.alpha, costs, share=counts.share), []).append("best predicted")
    rows = []
    for gamma, ratio in measured.items():
        row = {"gamma": gamma, "verify_cost": costs[gamma], "speedup": ratio, "best": ""}
        if counts.alpha is not None:
            row["predicted"] = speedup(counts.alpha, gamma, costs[gamma], share=counts.share)
        if gamma in marks:
            row["best"] = f"<- {', '.join(marks[gamma])}"
        rows.append(row)
    return rows


def measure_loop(
    network: nn.Module,
    smaller: nn.Module | None,
    texts: Mapping[str, Sequence[Sequence[int]]],
    tokens_out: int,
    gamma: int,
    gammas: Sequence[int],
    seed: int,
) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows of LOOP_COLUMNS, GAMMA_COLUMNS and THEORY_COLUMNS.

    Args:
        smaller: a model to draft with, beside the n-grams and the target's own first layers.
        texts: prompts of the "copying" and the "free" text.
        gammas: to try with n-grams on copying text; `gamma` is one of them.
    """
    ngram = ngram_way(network, gamma)
    ngrams = [replace(ngram, gamma=one) for one in gammas]
    sampled = replace(ngram, how="n-gram, temperature 1", temperature=1.0)
    layers = network.config.num_hidden_layers
    kept = max(1, round(LAYERS_PART * layers))
    short = first_layers(network, kept)
    others = [Way(f"first {kept} of {layers} layers", lambda: ModelDraft(short), LAYERS_GAMMA)]
    if smaller is not None:
        others.append(Way("smaller model", lambda: ModelDraft(smaller), gamma))

    rows, theory = [], []
    seconds = pass_seconds(network, texts["copying"][0], sorted({*gammas, LAYERS_GAMMA}))
    costs = {one: of_pass / seconds[0] for one, of_pass in seconds.items() if one}
    for text, ways in (("copying", [PLAIN, *ngrams, sampled, *others]), ("free", [PLAIN, ngram, *others])):
        waves, counts = run_ways(network, ways, texts[text], tokens_out, seed)
        rows += loop_rows(network, text, texts[text], waves)
        for way in (ngram, *others):
            draft_cost = draft_seconds(way, texts[text][0], network.device) / seconds[0]
            measured = waves[way].tokens_per_s / waves[PLAIN].tokens_per_s
            how = f"our loop, {way.how}"
            theory.append(theory_row(how, text, way.gamma, counts[way], costs[way.gamma], draft_cost, measured))
        if text == "copying":
            of_ngrams = {way.gamma: waves[way].tokens_per_s / waves[PLAIN].tokens_per_s for way in ngrams}
            by_gamma = gamma_rows(of_ngrams, counts[ngram], costs)
    return rows, by_gamma, theory


def exact_rows(
    network: nn.Module, requests: Sequence[Sequence[int]], tokens_out: int, gamma: int, seed: int
) -> list[dict]:
    """Rows of LOOP_COLUMNS in FP32, where no two tokens are as good as each other: n-grams on copying text.

    The network stays in FP32.
    """
    exact = network.float()
    waves, _ = run_ways(exact, [PLAIN, ngram_way(exact, gamma)], requests, tokens_out, seed)
    return loop_rows(exact, "copying", requests, waves)
