"""The command line of inference_serving.py, and how much work it means."""

import argparse
from dataclasses import dataclass

from ch16.parts.inference_serving.bodies import MAX_TOKENS
from common import cli, models
from common.cli import CannotRun
from common.gpu import Machine
from common.models import Model


def parse(doc: str) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and with --serve those for vLLM's server."""
    model_help = "auto, bundled, a folder, or a hub id such as deepseek-ai/deepseek-coder-6.7b-instruct"
    parser = cli.standard_parser(doc, model_help)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--demo", action="store_true", help="completions, load, claims (also without any flag)")
    mode.add_argument("--serve", action="store_true", help="the HTTP server; flags not listed here go to vLLM's")
    engine = parser.add_argument_group("engine")
    models.dummy_weights_flag(engine)
    engine.add_argument("--quantization", choices=("auto", "fp8", "none"), default="auto", help="auto: FP8 if native")
    engine.add_argument("--tensor-parallel", type=cli.positive_int, metavar="N", help="default: all GPUs, at most 8")
    engine.add_argument("--max-num-seqs", type=cli.positive_int, metavar="N", help="sequences decoded together")
    engine.add_argument("--compare-bf16", action="store_true", help="demo: measure BF16 and FP8 in the same run")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines")
    server.add_argument("--port", type=int, default=8000, help="answers from the first second on, also while loading")
    server.add_argument("--max-queue", type=cli.non_negative_int, default=256, help="sequences that may wait; then 429")
    server.add_argument("--max-body-bytes", type=cli.positive_int, default=4 << 20, help="larger bodies get 413")
    server.add_argument("--max-prompt-chars", type=cli.non_negative_int, default=0, help="0: 32 per token of context")
    server.add_argument("--drain-timeout", type=cli.non_negative_float, default=30.0, help="seconds after SIGTERM")
    args, unknown = parser.parse_known_args()
    if unknown and not args.serve:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.serve and (args.json or args.plot or args.compare_bf16 or args.quick):
        parser.error("--quick, --json, --plot and --compare-bf16 belong to the demo")
    if args.compare_bf16 and args.quantization != "auto":
        parser.error("--compare-bf16 measures both precisions; leave --quantization out")
    return args, unknown


def precisions(args: argparse.Namespace, model: Model, machine: Machine) -> tuple[str, ...]:
    """What to measure, as `common.engine.exceptions` calls it. CannotRun: --compare-bf16 without a choice of both."""
    if not args.compare_bf16:
        return (args.quantization,)
    if not machine.native_fp8:
        raise CannotRun(f"{machine.name} has no FP8 units (Ada, Hopper and newer GPUs do); leave --compare-bf16 out")
    if "quantization_config" in model.config:
        raise CannotRun(f"{model.name} is quantized already and runs as it is; --compare-bf16 needs a model in BF16")
    return "none", "fp8"


@dataclass(frozen=True)
class ServingSizes:
    """Tokens per completion, tokens in and out per load request, first concurrency."""

    completion: int
    tokens_in: int
    tokens_out: int
    first_wave: int


def sizes_for(machine: Machine, quick: bool) -> ServingSizes:
    """Sizes that fill a GPU, or finish quickly on two CPU cores."""
    if machine.device == "cuda":
        return ServingSizes(MAX_TOKENS, 256, 128, 64) if quick else ServingSizes(MAX_TOKENS, 512, 512, 64)
    return ServingSizes(48, 32, 32, 8) if quick else ServingSizes(MAX_TOKENS, 64, 64, 4)
