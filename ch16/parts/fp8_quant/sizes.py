"""How much `fp8_quant.py` measures: by machine, changed by flags, refused if memory or FP8 cannot take it."""

import argparse
import math
from dataclasses import dataclass, replace

from ch16.parts.fp8_quant.layers import RECIPES
from ch16.parts.fp8_quant.precision import require_multiples
from common import cli, models
from common.cli import CannotRun
from common.gpu import Machine, free_bytes


@dataclass(frozen=True)
class Fp8Sizes:
    """How much is measured. The defaults fill a GPU; their width is that of the chapter's model, deepseek-coder-33b."""

    hidden: int = 7168
    heads: int = 56
    kv_heads: int = 8
    layers: int = 8
    prefill: int = 16384  # tokens, in sequences of `sequence`
    sequence: int = 512
    gemm_tokens: tuple[int, ...] = (16, 64, 256, 1024, 2048, 8192, 16384)
    decode: tuple[int, ...] = (1, 32, 64, 128)  # sequences at once
    context: int = 512  # tokens in the KV cache of each
    window: int = 1024  # tokens of text read at a time
    batch: int = 16  # windows at a time
    eval_tokens: int = 100_000
    trial_tokens: int = 100_000  # for all recipes; the best one then reads eval_tokens
    repeats: int = 10

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a block's linear layers, under the chapter's names."""
        h, qkv = self.hidden, (self.heads + 2 * self.kv_heads) * self.head_dim
        return {"qkv_proj": (h, qkv), "out_proj": (h, h), "mlp_fc1": (h, 4 * h), "mlp_fc2": (4 * h, h)}

    @property
    def bf16_weight_bytes(self) -> int:
        """Bytes of the stack's linear layers in BF16."""
        return 2 * self.layers * sum(k * n for k, n in self.layer_shapes.values())


def sizes_for(machine: Machine, quick: bool) -> Fp8Sizes:
    """Sizes that fill a GPU, or finish quickly on two CPU cores."""
    if machine.device == "cuda":
        quicker = {"layers": 2, "gemm_tokens": (64, 1024, 8192), "decode": (64,), "eval_tokens": 50_000}
        return Fp8Sizes(**quicker, trial_tokens=20_000, repeats=5) if quick else Fp8Sizes()
    small = Fp8Sizes(512, 8, 2, 2, 256, 128, (), (), 0, window=256, batch=8, eval_tokens=50_000, trial_tokens=1_000)
    return replace(small, eval_tokens=2_000, trial_tokens=500) if quick else small


def parser_of(doc: str) -> argparse.ArgumentParser:
    """The script's flags."""
    parser = cli.standard_parser(doc, model_help="causal LM to score: auto, bundled, a folder, or a hub id")
    recipes = ", ".join(RECIPES)
    parser.add_argument("--recipes", type=recipe_names, default="all", metavar="A,B", help=f"all, or some of {recipes}")
    parser.add_argument("--hidden-size", type=cli.positive_int, metavar="H", help="width of products and blocks")
    parser.add_argument("--num-heads", type=cli.positive_int, metavar="N", help="attention heads of a block")
    parser.add_argument("--num-layers", type=cli.positive_int, metavar="N", help="blocks in the stack")
    parser.add_argument("--tokens", type=cli.positive_int, metavar="N", help="tokens of the stack's prefill")
    parser.add_argument("--eval-tokens", type=cli.positive_int, metavar="N", help="tokens of text to score")
    parser.add_argument("--text", metavar="FILE", help="text to score; default: Python's own language reference")
    return parser


def recipe_names(text: str) -> list[str]:
    """argparse type: "all", or names of recipes with commas between them."""
    names = list(RECIPES) if text == "all" else text.split(",")
    if unknown := [name for name in names if name not in RECIPES]:
        raise argparse.ArgumentTypeError(f"unknown recipe '{unknown[0]}'; here are {', '.join(RECIPES)}")
    return names


def sizes_from(args: argparse.Namespace, machine: Machine) -> Fp8Sizes:
    """The machine's sizes, with what the flags change; CannotRun if FP8 cannot take them."""
    sizes = sizes_for(machine, args.quick)
    given = {"hidden": args.hidden_size, "heads": args.num_heads, "layers": args.num_layers}
    given |= {"prefill": args.tokens, "eval_tokens": args.eval_tokens}
    sizes = replace(sizes, **{name: value for name, value in given.items() if value is not None})
    if args.num_heads is not None:
        sizes = replace(sizes, kv_heads=math.gcd(sizes.heads, sizes.kv_heads))
    if sizes.hidden % sizes.heads:
        raise CannotRun(f"--hidden-size {sizes.hidden} does not divide into --num-heads {sizes.heads}")
    outputs = {f"the output of {layer}": n for layer, (_, n) in sizes.layer_shapes.items()}
    require_multiples(**{"--hidden-size": sizes.hidden}, **outputs)
    if args.tokens is not None and args.tokens % sizes.sequence:
        sizes = replace(sizes, sequence=args.tokens)  # all of them in one sequence
    if len(args.recipes) < len(RECIPES) and not args.quick:  # fewer recipes: more text for each
        sizes = replace(sizes, trial_tokens=8 * sizes.trial_tokens)
    return replace(sizes, trial_tokens=min(sizes.trial_tokens, sizes.eval_tokens))


def check_memory(machine: Machine, sizes: Fp8Sizes, model: models.Model) -> None:
    """Raise CannotRun before work starts if BF16 and FP8 weights and the widest activations do not fit."""
    widest = sizes.prefill * sizes.hidden * (4 + 4 + 2) * 2  # the MLP's hidden layer before and after GELU, the rest
    product = max(sizes.gemm_tokens, default=0) * sizes.hidden * 4 * 2 * 6  # six outputs are kept
    stack = 1.5 * sizes.bf16_weight_bytes + widest
    reading = 3 * (models.parameter_count(model.config) or 0) + sizes.batch * sizes.window * 8192
    needed, free = max(stack, product, reading), free_bytes(machine)
    if needed > free:
        memory = f"about {needed / 2**30:.0f} GiB of memory are needed and {free / 2**30:.0f} GiB are free"
        raise CannotRun(f"{memory}; choose a smaller --hidden-size, --num-layers, --tokens or --model")
