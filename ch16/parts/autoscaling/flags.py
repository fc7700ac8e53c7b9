"""The command line, and how much to simulate."""

import argparse
import math
from dataclasses import dataclass

from ch16.parts.autoscaling.signals import signals
from common import cli, models
from common.gpu import Machine


@dataclass(frozen=True)
class FleetSizes:
    """How much to simulate."""

    slots: int  # per replica
    scale: float  # factor on the trace's lengths
    hours: float  # of bursts
    targets: int  # tried first in a search


def sizes_for(machine: Machine, quick: bool) -> FleetSizes:
    """On a GPU fewer hours: a replica answers several times as many requests per hour."""
    if machine.device == "cuda":
        return FleetSizes(64, 1.0, 2.0, 5) if quick else FleetSizes(64, 1.0, 4.0, 12)
    return FleetSizes(8, 0.2, 2.0, 5) if quick else FleetSizes(8, 0.4, 8.0, 12)


def parse(doc: str, slack: int, manifest: str) -> argparse.Namespace:
    """The flags, checked against each other; `slack`: factor of the default objective, `manifest`: of --hpa."""
    parser = cli.standard_parser(doc, model_help="auto, bundled, a folder, or a hub id")
    models.dummy_weights_flag(parser)
    fleet = parser.add_argument_group("fleet")
    fleet.add_argument("--signals", nargs="+", choices=list(signals(1)), default=list(signals(1)), help="to scale on")
    fleet.add_argument("--costs", metavar="FILE", help="the engine as measured by an earlier run with --json FILE")
    fleet.add_argument("--cold-start-s", type=float, default=120.0, metavar="S", help="until a new replica serves")
    objective = f"objective; default: {slack} times that of an idle replica"
    fleet.add_argument("--slo-ttft-ms", type=cli.positive_float, metavar="MS", help=objective)
    fleet.add_argument("--trace", metavar="FILE", help="also replay this: Azure's .csv or Mooncake's .jsonl")
    gap = "without requests, beyond which a trace counts as broken"
    fleet.add_argument("--max-gap-s", type=cli.positive_float, default=3600.0, metavar="S", help=gap)
    rules = f"a manifest whose windows and policies are also simulated; default: this repository's {manifest}"
    fleet.add_argument("--hpa", metavar="FILE", help=rules)
    fleet.add_argument("--emit", action="store_true", help="print the manifest alone; all else goes to stderr")
    args = parser.parse_args()
    if not 0 <= args.cold_start_s < math.inf:
        parser.error(f"--cold-start-s must be at least 0, not {args.cold_start_s}")
    if args.emit and args.plot:
        parser.error("--plot draws what --emit leaves out: give one of them")
    if args.emit and args.hpa:
        parser.error("--emit writes a manifest with Kubernetes' default rules, and not those of --hpa")
    return args
