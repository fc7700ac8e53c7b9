"""How much the MoE benchmark does: its flags, and the layers, tokens and models that fit this machine."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ch16.parts.moe_benchmark.planner import Workload
from ch16.parts.moe_benchmark.presets import PRESETS, Preset, from_config, require_memory, those_that_fit
from common import cli, models
from common.cli import CannotRun
from common.gpu import Machine
from common.models import Model
from common.text import read_text

WEIGHT_COPIES = 2  # at most: ours, and in FP8 or as vLLM's CPU kernel packs them
CONTENDERS = 4  # three kinds of dispatch, and vLLM's kernel


def read_flags(doc: str) -> argparse.Namespace:
    """The script's flags, and `ranks`, the number of processes that torchrun has started."""
    parser = cli.standard_parser(doc, model_help="trained MoE whose routers are measured: a folder or a hub id")
    parser.set_defaults(model=None)
    parser.add_argument("--preset", choices=sorted(PRESETS), help="only this model's layer, routing and plan")
    parser.add_argument("--hidden-size", type=cli.positive_int, metavar="H", help="width of the chapter's layers")
    parser.add_argument("--tokens", metavar="A,B", help="tokens of a layer's input, as in 64,8192")
    parser.add_argument("--text", metavar="FILE", help="for --model to read; default: Python's language reference")
    plan = parser.add_argument_group("flags of the plan")
    number = {"type": cli.positive_int, "metavar": "N"}
    plan.add_argument("--sequences", **number, help="requests at once")
    plan.add_argument("--target-tok-s", **number, help="print how many GPUs reach this output")
    number = {"type": cli.positive_float, "metavar": "N"}
    plan.add_argument("--link-gb-s", **number, help="between GPUs; default: from the data sheet")
    plan.add_argument("--link-latency-us", **number, help="of each of the two exchanges per layer")
    plan.add_argument("--no-validation", action="store_true", help="do not run the whole model on vLLM")
    args = parser.parse_args()
    args.ranks = int(os.environ.get("WORLD_SIZE", 1))
    plan_flags = (args.sequences, args.target_tok_s, args.link_gb_s, args.link_latency_us, args.no_validation)
    if args.ranks > 1 and any((args.model, args.text, *plan_flags)):
        parser.error("--model, --text and the flags of the plan belong to a run without torchrun")
    if args.hidden_size and args.preset:
        parser.error("--hidden-size is for the chapter's layers; a --preset has its own width")
    if args.target_tok_s and args.preset and not PRESETS[args.preset].layers:
        parser.error(f"--target-tok-s needs a whole model; of {args.preset} only the layer of experts is known here")
    return args


@dataclass(frozen=True)
class MoESizes:
    """Width of the chapter's layers, tokens in decode and in prefill, and the workload of the plan."""

    hidden: int
    gated_intermediate: int
    tokens: tuple[int, ...]
    repeats: int
    workload: Workload
    presets: tuple[str, ...]  # published layers to measure beside the chapter's
    checked: int = 16  # tokens compared with float64


def sizes_for(machine: Machine, quick: bool) -> MoESizes:
    """Sizes that fill a GPU, or finish quickly on two CPU cores."""
    if machine.device == "cuda":
        published = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3")
        full = MoESizes(4096, 2048, (64, 8192), 20, Workload(128, 256, 256), published)
        return replace(full, repeats=10, presets=published[1:2]) if quick else full
    full = MoESizes(512, 256, (16, 512), 7, Workload(16, 64, 48, chunk=2048), ("small-moe",))
    return replace(full, hidden=256, repeats=5, presets=()) if quick else full


def sizes_from(args: argparse.Namespace, machine: Machine) -> MoESizes:
    """The machine's sizes, with what the flags change."""
    sizes = sizes_for(machine, args.quick)
    if args.tokens is not None:
        try:
            tokens = tuple(sorted(int(word) for word in args.tokens.split(",")))
        except ValueError:
            raise CannotRun(f"--tokens takes numbers, as in 64,8192, not '{args.tokens}'") from None
        if tokens[0] < 1:
            raise CannotRun(f"--tokens {tokens[0]}: there is nothing to route")
        sizes = replace(sizes, tokens=tokens)
    if args.hidden_size:
        sizes = replace(sizes, hidden=args.hidden_size, gated_intermediate=max(1, args.hidden_size // 2))
    if args.sequences:
        sizes = replace(sizes, workload=replace(sizes.workload, sequences=args.sequences))
    return sizes


def chapter_presets(configs: Sequence[Mapping[str, int]], sizes: MoESizes) -> list[Preset]:
    """The chapter's configurations, and those of 64 experts also with gated experts, as models have them today."""
    layers = []
    for gated, intermediate in ((False, 4 * sizes.hidden), (True, sizes.gated_intermediate)):
        for config in configs:
            experts, top_k = config["num_experts"], config["experts_per_token"]
            name = f"{experts} {'gated ' if gated else ''}experts, top-{top_k}"
            if not gated or experts == 64:
                layers.append(Preset(name, sizes.hidden, intermediate, experts, top_k, gated))
    return layers


@dataclass(frozen=True)
class Selection:
    """What one run measures: layers, the layer whose routing is measured, and a trained model to read text with."""

    layers: list[Preset]
    left_out: list[str]  # why, for each layer that does not fit
    routed: Preset
    model: Model | None = None
    text: str = ""
    source: str = ""  # of the text


def select(args: argparse.Namespace, machine: Machine, sizes: MoESizes, chapter: list[Preset]) -> Selection:
    """What to measure; CannotRun if it does not fit into free memory, or there is no such model or text."""
    presets = [PRESETS[args.preset]] if args.preset else chapter + [PRESETS[name] for name in sizes.presets]
    layers, left_out = those_that_fit(presets, max(sizes.tokens), machine, copies=WEIGHT_COPIES, contenders=CONTENDERS)
    if left_out and (args.hidden_size or args.tokens):  # asked for, not a default
        raise CannotRun(left_out[0])
    routed, trained = PRESETS[args.preset] if args.preset else chapter[-1], ()
    if args.model:  # also with --preset: what is routed has as many experts as the model
        model = models.resolve(args.model, machine)
        routed, trained = from_config(model.name, model.config), (model, *read_text(args.text))
    require_memory(routed, max(sizes.tokens), machine, contenders=8)
    return Selection(layers, left_out, routed, *trained)


def whole_preset(args: argparse.Namespace, machine: Machine) -> Preset:
    """The model to plan for: --preset, else the largest that runs here with room for its KV cache."""
    if args.preset:
        if not PRESETS[args.preset].layers:
            raise CannotRun(f"of {args.preset} only the layer of experts is known here")
        return PRESETS[args.preset]
    for name in ("qwen3-30b-a3b", "olmoe-1b-7b") if machine.device == "cuda" else ():
        if 2 * PRESETS[name].parameters <= 0.8 * machine.memory_bytes:
            return PRESETS[name]
    return PRESETS["small-moe"]
