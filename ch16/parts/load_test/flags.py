"""The command line of load_test.py, and how much work it means."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import cli
from common.gpu import Machine
from common.loadclient import RequestLoad
from common.traces import BUNDLED, Arrival, mean_lengths, read_trace, shrink


def parse(doc: str) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The flags, and the parser for errors found later."""
    parser = cli.standard_parser(doc, model_help="served if there is no --url: auto, bundled, a folder, or a hub id")
    tests = parser.add_argument_group("load")
    tests.add_argument("--url", help="a running OpenAI-compatible server (its key, if any, in OPENAI_API_KEY)")
    tests.add_argument("--tokenizer", help="of the served model: a folder or a hub id")
    tests.add_argument("--requests", type=cli.positive_int, help="per run")
    tests.add_argument("--tokens-in", type=cli.positive_int, help="per prompt; default: the trace's mean")
    tests.add_argument("--tokens-out", type=cli.positive_int, help="per answer; default: the trace's mean")
    tests.add_argument("--rates", type=cli.positive_float, nargs="+", metavar="R", help="only these open loops, req/s")
    tests.add_argument("--users", type=cli.positive_int, nargs="+", metavar="N", help="only closed loops of N")
    tests.add_argument("--burstiness", type=cli.positive_float, default=1.0, help="below 1: burstier than Poisson")
    tests.add_argument("--shared-tokens", type=cli.non_negative_int, default=0, help="that all prompts begin with")
    tests.add_argument("--trace", default=str(BUNDLED), metavar="FILE", help="Azure's .csv or Mooncake's .jsonl")
    tests.add_argument("--trace-scale", type=cli.positive_float, help="times the trace's lengths; default: by machine")
    tests.add_argument("--slo-ttft-ms", type=cli.positive_float, help="objective; default: 10x the unloaded median")
    tests.add_argument("--slo-tpot-ms", type=cli.positive_float, help="objective; default: 3x the unloaded median")
    args = parser.parse_args()
    if args.plot and args.users and not args.rates:
        parser.error("--plot draws open loops by their rate, and --users are none: name --rates, too")
    return parser, args


@dataclass(frozen=True)
class LoadSizes:
    """Requests per run and in the trace, the factor of the trace's lengths, and how the knee is searched."""

    requests: int
    trace_requests: int
    scale: float
    fractions: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0)  # of the throughput when all requests come at once
    refine: int = 2  # halvings around the knee
    trace_refine: int = 4  # halvings below the knee, if the trace misses the objective there

    @property
    def runs(self) -> int:
        """At most, for the progress bar."""
        return 8 + len(self.fractions) + self.refine + self.trace_refine


def sizes_for(machine: Machine, quick: bool) -> LoadSizes:
    """Some seconds per run, so that a growing queue is seen to grow."""
    if quick:
        return LoadSizes(64, 108, 1 / 16, (0.5, 0.8, 1.0), 1, 3)
    if machine.device == "cuda":
        return LoadSizes(400, 648, 1.0)
    return LoadSizes(120, 108, 1 / 16, (0.4, 0.6, 0.8, 1.0))


def trace_for(args: argparse.Namespace, sizes: LoadSizes) -> list[Arrival]:
    """The trace, its lengths scaled to fit the machine."""
    return shrink(read_trace(args.trace)[: sizes.trace_requests], args.trace_scale or sizes.scale, max_tokens=2048)


def synthetic_load(args: argparse.Namespace, sizes: LoadSizes, trace: Sequence[Arrival]) -> RequestLoad:
    """Random prompts with the trace's mean lengths, unless others were asked for."""
    requests, (tokens_in, tokens_out) = args.requests or sizes.requests, map(round, mean_lengths(trace))
    tokens_in, tokens_out = args.tokens_in or tokens_in, max(2, args.tokens_out or tokens_out)
    shape = {"burstiness": args.burstiness, "tokens_shared": args.shared_tokens}
    return RequestLoad(requests, tokens_in, tokens_out, **shape)


def recorded(args: argparse.Namespace, sizes: LoadSizes, model: str, base: RequestLoad) -> dict[str, object]:
    """The settings for the JSON."""
    loads = {key: getattr(base, key) for key in ("requests", "tokens_in", "tokens_out", "tokens_shared", "burstiness")}
    asked = {key: getattr(args, key) for key in ("slo_ttft_ms", "slo_tpot_ms", "seed")}
    trace = {"trace": Path(args.trace).name, "trace_scale": args.trace_scale or sizes.scale}
    return {"model": model} | loads | asked | trace
