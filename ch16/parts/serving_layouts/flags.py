"""The command line of serving_layouts.py, and what it asks for."""

import argparse
from collections.abc import Callable

from common import cli, models
from common.engine import use_fp8
from common.gpu import Machine
from common.loadclient import RequestLoad
from common.models import Model

CHAPTER_SHAPE, CPU_SHAPE = "deepseek-coder-33b", "small-moe"  # random weights: on GPUs, and on a CPU


def parse(doc: str, parse_layout: Callable[[str], object]) -> argparse.Namespace:
    """The flags; `parse_layout` is the type of a layout."""
    parser = cli.standard_parser(doc, f"default: random weights, of {CHAPTER_SHAPE} on GPUs, of {CPU_SHAPE} on a CPU")
    parser.set_defaults(model=None)
    models.dummy_weights_flag(parser)
    parser.add_argument("--quantization", choices=("auto", "fp8", "none"), default="auto", help="auto: FP8 if native")
    layouts_help = "R replicas over T devices each, as in 8x1 2x4 1x8; default: all that use every device"
    parser.add_argument("--layouts", type=parse_layout, nargs="+", metavar="RxT", help=layouts_help)
    parser.add_argument("--requests", type=cli.positive_int, nargs="+", metavar="N", help="loads: N requests at once")
    parser.add_argument("--slo-ttft-ms", type=cli.positive_float, default=10_000.0, metavar="MS", help="objective")
    parser.add_argument("--slo-tpot-ms", type=cli.positive_float, default=50.0, metavar="MS", help="objective")
    parser.add_argument("--gpu-hour-price", type=cli.positive_float, metavar="P", help="of one GPU, in any currency")
    parser.add_argument("--dry-run", action="store_true", help="print processes and memory, start nothing")
    machine_help = "of the dry run: N GPUs of G GB; default: 8x80 and 8x141 (H100, H200)"
    parser.add_argument("--machine", type=machine_type, nargs="+", metavar="NxG", help=machine_help)
    args = parser.parse_args()
    if args.machine and not args.dry_run:
        parser.error("--machine belongs to --dry-run; a run takes the machine that it is on")
    if args.plot and len(args.machine or ()) > 2:
        parser.error("--plot draws at most two machines")
    args.machine = args.machine or [machine_type("8x80"), machine_type("8x141")]
    return args


def machine_type(text: str) -> Machine:
    """argparse type: NxG, a host with N GPUs of G GiB, for the dry run."""
    count, memory = map(int, text.split("x"))
    if min(count, memory) < 1:
        raise ValueError(text)
    return Machine("cuda", f"{memory} GB", count, memory * 2**30, 0, None, native_bf16=True, native_fp8=True)


def loads_for(args: argparse.Namespace, machine: Machine) -> list[RequestLoad]:
    """The loads that were asked for, else the chapter's on GPUs, or loads that finish quickly on two CPU cores."""
    if args.quick:
        tokens, per_device = 32, (8, 16)
    else:
        tokens, per_device = (512, (64, 128, 192, 256)) if machine.device == "cuda" else (64, (4, 16))
    numbers = args.requests or [number * machine.count for number in per_device]
    return [RequestLoad(number, tokens_in=tokens, tokens_out=tokens) for number in numbers]


def model_for(args: argparse.Namespace, machine: Machine) -> tuple[Model, bool]:
    """The model that was asked for, else random weights of a shape; and whether it runs in FP8."""
    shape = CHAPTER_SHAPE if machine.device == "cuda" else CPU_SHAPE
    model = models.chosen(args, machine) if args.model or args.dummy_weights else models.dummy(shape)
    return model, "quantization_config" not in model.config and use_fp8(machine, args.quantization)
