"""How much `inference_profiling.py` profiles: by machine, changed by flags, refused if it does not fit."""

import argparse

import torch

from ch16.parts.inference_profiling.tables import ProfiledRun
from ch16.parts.inference_profiling.work import Weights
from common import cli, models
from common.cli import CannotRun
from common.gpu import Machine, free_bytes
from common.models import Model, kv_bytes_per_token
from common.text import read_text, token_windows


def parser_of(doc: str, trace: str) -> argparse.ArgumentParser:
    """The script's flags; `trace` is the default trace file."""
    parser = cli.standard_parser(doc, model_help="auto, bundled, a folder, or a hub id")
    models.dummy_weights_flag(parser)
    parser.add_argument("--engine", choices=("torch", "vllm"), default="torch", help="what to profile")
    parser.add_argument("--batch", type=cli.positive_int, default=1, help="sequences at once")
    prompt_help = "default: 256 on a CPU, 2048 on a GPU; with --quick 128 and 512"
    parser.add_argument("--prompt-tokens", type=cli.positive_int, metavar="N", help=prompt_help)
    parser.add_argument("--trace", type=cli.output_file, metavar="FILE.json", default=trace, help="write the trace to")
    parser.add_argument("--stacks", action="store_true", help="also record call stacks (slow)")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, as --quick on a CPU")
    return parser


def run_from(args: argparse.Namespace, model: Model, machine: Machine, steps: int) -> ProfiledRun:
    """A prompt long enough to be compute-bound, unless flags differ; CannotRun if the model's context is shorter."""
    enough = {("cuda", False): 2048, ("cuda", True): 512, ("cpu", False): 256, ("cpu", True): 128}
    prompt = args.prompt_tokens or min(enough[machine.device, args.quick], model.max_context - steps - 2)
    if prompt < 1 or prompt + steps + 2 > model.max_context:
        raise CannotRun(f"{model.name} takes {model.max_context} tokens; {prompt + steps + 2} are needed")
    return ProfiledRun(args.batch, prompt, steps)


def require_memory(machine: Machine, weights: Weights, model: Model, run: ProfiledRun) -> None:
    """CannotRun without room for weights, embedding, logits of all prompts, a growing cache and one of fixed size."""
    numbers = weights.layers + 2 * weights.head + run.batch * run.prompt * model.vocab_size
    cache = run.batch * (run.prompt + run.steps) * kv_bytes_per_token(model.config, weights.itemsize)
    needed, free = numbers * weights.itemsize + 2 * cache, free_bytes(machine)
    if needed > free:
        raise CannotRun(f"{model.name} needs {needed / 1e9:.1f} GB for this load, {free / 1e9:.1f} GB are free")


def prompts(model: Model, tokenizer: object, run: ProfiledRun) -> torch.Tensor:
    """Prompts [B, S]: the same text for each, or random tokens for random weights."""
    if model.dummy:
        return torch.randint(10, model.vocab_size, (run.batch, run.prompt))
    return token_windows(read_text(None)[0], tokenizer, 1, run.prompt).expand(run.batch, -1)
