"""FP8 quantization with Transformer Engine: does it halve memory, double throughput, keep accuracy?

FP8 spends 4 exponent and 3 mantissa bits (E4M3) or 5 and 2 (E5M2) on a number, so a scale has to bring every tensor
into the little range there is. A recipe says where the scale comes from: `delayed` from tensors seen before (so it
must be calibrated), `current` from the tensor itself, `block` from each 128 values, `row` from each token.

An NVIDIA GPU from Ada or Hopper on shows the speed (one GPU is used); any machine shows formats, memory and
accuracy, on PyTorch's own float8 types. There the product is emulated: same values, no speed.

    python3 ch16/fp8_quant.py                              # formats, products, a transformer, a real model
    python3 ch16/fp8_quant.py --quick --plot fp8.png
    python3 ch16/fp8_quant.py --hidden-size 4096 --num-heads 32 --recipes delayed,current

How to read the tables: "limit" is torch._scaled_mm on operands that are FP8 already; what a recipe lies below it is
the price of making FP8 from BF16 activations. Decode is shown eager and as a CUDA graph: at a few tokens the host
needs longer to launch an FP8 layer than the GPU to run it.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import contextlib
import math
import types
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ch16.parts.fp8_quant import accuracy, formats
from ch16.parts.fp8_quant.emulated import fast_bf16
from ch16.parts.fp8_quant.gemm import gemm_columns, measure_gemm
from ch16.parts.fp8_quant.precision import Precision, bf16, padded_rows, recipes, require_multiples, transformer_engine
from ch16.parts.fp8_quant.sizes import Sizes
from ch16.parts.fp8_quant.stack import MEMORY_COLUMNS, STACK_COLUMNS, measure_stack
from common import cli, fp8, models
from common.cli import CannotRun
from common.gpu import Machine, detect, free_bytes
from common.plots import draw, save_plot
from common.results import Column, Report, Verdict, judge, not_applicable
from common.text import load_model, read_text

# ---- configuration: the chapter's claims, and sizes that show them ----

MEMORY_TARGET = 0.52  # FP8 over BF16 weight bytes: half, and the scales
SPEED_TARGET = 2.0
PERPLEXITY_TARGET = 1.01
TOP1_TARGET_PERCENT = 1.0


def sizes_for(machine: Machine, quick: bool) -> Sizes:
    """Sizes that fill a GPU, or end in time on two CPU cores."""
    if machine.device == "cuda":
        quicker = {"layers": 2, "gemm_tokens": (64, 1024, 8192), "decode": (64,), "eval_tokens": 50_000}
        return Sizes(**quicker, trial_tokens=20_000, repeats=5) if quick else Sizes()
    small = Sizes(512, 8, 2, 2, 256, 128, (), (), 0, window=256, batch=8, eval_tokens=50_000, trial_tokens=1_000)
    return replace(small, eval_tokens=2_000, trial_tokens=500) if quick else small


# ---- mechanism: the chapter's block, in BF16 or FP8 ----


class FP8TransformerBlock(nn.Module):
    """Pre-norm transformer block: causal attention and an MLP of four times the width.

    The linear layers are the chapter's: qkv_proj, out_proj, and mlp_fc1 and mlp_fc2, which are one module here
    because Transformer Engine then makes FP8 from the GELU's output in the same kernel. The same holds for the
    normalisations. Attention itself runs in BF16.

    Args:
        hidden_size: width H, a multiple of 16.
        num_heads: query heads; H must divide by it.
        num_kv_heads: key and value heads (grouped-query attention); default: as many.
        precision: BF16 or an FP8 recipe; weights are created in it.
        device: where the weights live.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        precision: Precision,
        device: str = "cuda",
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim = hidden_size // num_heads
        self.precision = precision
        qkv_size = (num_heads + 2 * self.num_kv_heads) * self.head_dim
        options = {"bias": False, "params_dtype": torch.bfloat16, "device": device}
        with torch.no_grad(), precision.weights():  # without gradients no transposed second copy is kept
            self.qkv_proj = precision.library.LayerNormLinear(hidden_size, qkv_size, **options)
            self.out_proj = precision.library.Linear(hidden_size, hidden_size, **options)
            self.mlp = precision.library.LayerNormMLP(hidden_size, 4 * hidden_size, **options)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None, position: int = 0) -> torch.Tensor:
        """x [B, S, H] to the same shape.

        Args:
            x: S > 1 tokens of a prompt at position 0, or one token at any position.
            cache: [2, B, num_kv_heads, context, head_dim]; keys and values are written at `position`.
            position: tokens already in the cache.
        """
        with self.precision.compute():
            x = x + padded_rows(self.out_proj, self._attention(padded_rows(self.qkv_proj, x), cache, position))
            return x + padded_rows(self.mlp, x)

    def _attention(self, qkv: torch.Tensor, cache: torch.Tensor | None, position: int) -> torch.Tensor:
        batch, tokens, _ = qkv.shape
        if tokens > 1 and position > 0:
            raise ValueError("several tokens are a prompt and start at position 0")
        heads = qkv.view(batch, tokens, -1, self.head_dim).transpose(1, 2)  # [B, heads, S, D]
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if cache is not None:
            cache[0, :, :, position : position + tokens] = k
            cache[1, :, :, position : position + tokens] = v
            k, v = cache[:, :, :, : position + tokens]
        with _fastest_attention(q):
            mixed = F.scaled_dot_product_attention(
                q, k, v, is_causal=tokens > 1, enable_gqa=self.num_kv_heads < self.num_heads
            )
        return mixed.transpose(1, 2).reshape(batch, tokens, -1)


def _fastest_attention(q: torch.Tensor) -> contextlib.AbstractContextManager:
    if q.device.type == "cpu":
        return contextlib.nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


class FP8TransformerModel(nn.Module):
    """A stack of blocks; with `precision` BF16 it is the twin to compare with."""

    def __init__(self, sizes: Sizes, precision: Precision, device: str) -> None:
        super().__init__()
        shape = (sizes.hidden, sizes.heads, sizes.kv_heads)
        blocks = [FP8TransformerBlock(*shape, precision=precision, device=device) for _ in range(sizes.layers)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor, caches: Sequence[torch.Tensor] | None = None, position: int = 0) -> torch.Tensor:
        """x [B, S, H] to the same shape; a cache for each block, as in FP8TransformerBlock."""
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i], position)
        return x


# ---- measurement: formats and products here; stacks and accuracy in ch16/parts/fp8_quant ----

FORMAT_COLUMNS = (
    Column("format", "format"),
    Column("bits", "bits", "d"),
    Column("largest", "largest", ".4g"),
    Column("smallest_normal", "smallest normal", ".3g"),
    Column("smallest", "smallest", ".3g"),
    Column("steps", "steps from 2^n to 2^(n+1)", ",d"),
    Column("rounding_percent", "rounding error up to %", ".2g"),
)
ERROR_COLUMNS = (
    Column("tensor", "tensor"),
    Column("format", "format"),
    Column("scaling", "one scale for"),
    Column("error_percent", "relative error %", ".2f"),
    Column("row_error_percent", "mean of rows %", ".2f"),
    Column("zeroed_percent", "became zero %", ".3f"),
    Column("saturated_percent", "saturated %", ".4f"),
)


def scaling_errors(weight: torch.Tensor, inputs: torch.Tensor) -> list[dict]:
    """What each format and scaling loses on a layer's weight [N, K] and its input [T, K]."""
    tensors = (("weight", weight, fp8.WEIGHT_BLOCK), ("input", inputs, fp8.ACTIVATION_BLOCK))
    return [
        {"tensor": name, **formats.error_row(x, scaling, kind, block)}
        for name, x, block in tensors
        for kind in ("E4M3", "E5M2")
        for scaling in fp8.SCALINGS
    ]


def measure_gemms(base: Precision, precisions: Sequence[Precision], machine: Machine, sizes: Sizes) -> list[dict]:
    """The largest layer at all numbers of tokens, then every layer at the largest."""
    shapes = sizes.layer_shapes
    work = [("mlp_fc1", tokens) for tokens in sizes.gemm_tokens]
    work += [(name, sizes.gemm_tokens[-1]) for name in shapes if name != "mlp_fc1"]
    return [
        measure_gemm(name, *shapes[name], tokens, base, precisions, machine, sizes.repeats) for name, tokens in work
    ]


# ---- claims ----


def claims(memory: Sequence[dict], speed: Sequence[dict], readings: Sequence[dict], why_no_speed: str) -> list[Verdict]:
    """F1 to F3 from the rows of the three measurements."""
    ratio = max(row["weight_ratio"] for row in memory)
    measured = f"weights {ratio:.3f} of BF16"
    if peaks := [row["fp8_peak_mb"] / row["bf16_peak_mb"] for row in memory if "fp8_peak_mb" in row]:
        measured += f"; with activations up to {max(peaks):.2f} (prefill)"
    verdicts = [judge("F1", ratio <= MEMORY_TARGET, measured)]

    if speed:
        best = {
            phase: max((r for r in speed if r["phase"] == phase), key=lambda r: r["speedup"])
            for phase in dict.fromkeys(r["phase"] for r in speed)
        }
        text = ", ".join(f"{r['speedup']:.2f}x in {phase} ({r['recipe']})" for phase, r in best.items())
        verdicts.append(judge("F2", min(r["speedup"] for r in best.values()) >= SPEED_TARGET, text))
    else:
        verdicts.append(not_applicable("F2", why_no_speed))

    best = readings[-1]
    text = (
        f"{best['recipe']}, {best['tokens']:,} tokens: perplexity {100 * (best['perplexity_ratio'] - 1):+.1f}%, "
        f"right next tokens {-best['top1_lost_percent']:+.1f}%"
    )
    kept = best["perplexity_ratio"] <= PERPLEXITY_TARGET and best["top1_lost_percent"] < TOP1_TARGET_PERCENT
    return [*verdicts, judge("F3", kept, text)]


# ---- the script ----


def plot(
    path: str, errors: Sequence[dict], gemms: Sequence[dict], names: Sequence[str], readings: Sequence[dict]
) -> None:
    """Error by scaling beside speed-up over tokens; without speeds, beside the perplexity each recipe costs."""
    figure, (left, right) = draw(2)
    groups = [(tensor, kind) for tensor in ("weight", "input") for kind in ("E4M3", "E5M2")]
    for i, scaling in enumerate(fp8.SCALINGS):
        by_group = {(r["tensor"], r["format"]): r["row_error_percent"] for r in errors if r["scaling"] == scaling}
        left.bar([x + 0.2 * i for x in range(len(groups))], [by_group[g] for g in groups], 0.19, label=scaling)
    left.set(title="relative error (mean of rows), %")
    left.set_xticks([x + 0.3 for x in range(len(groups))], [f"{tensor}\n{kind}" for tensor, kind in groups])
    left.legend(title="one scale for")
    if gemms:
        rows = [row for row in gemms if row["layer"] == "mlp_fc1"]
        for name, style in [*((name, "o-") for name in names), ("limit", "k--")]:
            right.plot([r["tokens"] for r in rows], [r[name] / r["BF16"] for r in rows], style, label=name)
        right.plot([r["tokens"] for r in rows], [r["eager_speedup"] for r in rows], "x:", label=f"{names[0]}, eager")
        right.axhline(1, color="grey", linewidth=0.8)
        right.set(title="speed-up over BF16, mlp_fc1", xscale="log", xlabel="tokens", ylim=(0, None))
        right.legend()
    else:
        rows = readings[1:]
        right.barh(
            [f"{r['recipe']} ({r['tokens']:,})" for r in rows], [100 * (r["perplexity_ratio"] - 1) for r in rows]
        )
        right.invert_yaxis()
        right.set(title="perplexity above BF16, % (tokens read)")
    save_plot(figure, path)


def check_memory(machine: Machine, sizes: Sizes, model: models.Model) -> None:
    """Raise CannotRun before work starts if BF16 and FP8 weights and the widest activations cannot be held."""
    widest = sizes.prefill * sizes.hidden * (4 + 4 + 2) * 2  # the MLP's hidden layer before and after GELU, the rest
    product = max(sizes.gemm_tokens, default=0) * sizes.hidden * 4 * 2 * 6  # six contenders keep their outputs
    stack = 1.5 * sizes.bf16_weight_bytes + widest
    reading = 3 * (models.parameter_count(model.config) or 0) + sizes.batch * sizes.window * 8192
    needed = max(stack, product, reading)
    free = free_bytes(machine)
    if needed > free:
        raise CannotRun(
            f"about {needed / 2**30:.0f} GiB of memory are needed and {free / 2**30:.0f} GiB are free; "
            "choose a smaller --hidden-size, --num-layers, --tokens or --model"
        )


def sizes_from(args: argparse.Namespace, machine: Machine) -> Sizes:
    """The machine's sizes, with what the flags change.

    Raises:
        CannotRun: FP8 cannot take them.
    """
    sizes = sizes_for(machine, args.quick)
    given = {"hidden": args.hidden_size, "heads": args.num_heads, "layers": args.num_layers}
    given |= {"prefill": args.tokens, "eval_tokens": args.eval_tokens}
    sizes = replace(sizes, **{name: value for name, value in given.items() if value is not None})
    if args.num_heads is not None:
        sizes = replace(sizes, kv_heads=math.gcd(sizes.heads, sizes.kv_heads))
    if sizes.hidden % sizes.heads:
        raise CannotRun(f"--hidden-size {sizes.hidden} does not divide into --num-heads {sizes.heads}")
    require_multiples(**{"--hidden-size": sizes.hidden})
    for layer, (_, n) in sizes.layer_shapes.items():
        require_multiples(**{f"the output of {layer}": n})
    if args.tokens is not None:
        whole = args.tokens % sizes.sequence == 0
        sizes = replace(sizes, sequence=sizes.sequence if whole else args.tokens)  # otherwise one sequence
    if args.recipes != "all" and not args.quick:  # fewer recipes: more text for each
        sizes = replace(sizes, trial_tokens=8 * sizes.trial_tokens)
    return replace(sizes, trial_tokens=min(sizes.trial_tokens, sizes.eval_tokens))


def main() -> int:
    """Measure formats, products, a stack of blocks and a real model; print the claims."""
    parser = cli.standard_parser(__doc__, model_help="causal LM to score: auto, bundled, a folder, or a hub id")
    parser.add_argument(
        "--recipes",
        default="all",
        metavar="A,B",
        help="delayed, current, block, row, tuned, weights, unscaled; all on a CPU leaves out tuned",
    )
    parser.add_argument("--hidden-size", type=cli.positive_int, metavar="H", help="width of products and blocks")
    parser.add_argument("--num-heads", type=cli.positive_int, metavar="N", help="attention heads of a block")
    parser.add_argument("--num-layers", type=cli.positive_int, metavar="N", help="blocks in the stack")
    parser.add_argument("--tokens", type=cli.positive_int, metavar="N", help="tokens of the stack's prefill")
    parser.add_argument("--eval-tokens", type=cli.positive_int, metavar="N", help="tokens of text to score")
    parser.add_argument("--text", metavar="FILE", help="text to score; default: Python's own language reference")
    args = parser.parse_args()

    machine = detect(args.device)
    te, why_no_te = transformer_engine(machine.device)
    available = recipes(te)
    # Tuning reads 16 times 8,000 tokens: seconds on a GPU, minutes on two CPU cores.
    everything = [name for name in available if name != "tuned" or machine.device == "cuda"]
    wanted = everything if args.recipes == "all" else args.recipes.split(",")
    if unknown := [name for name in wanted if name not in available]:
        parser.error(f"unknown recipe '{unknown[0]}'; here are {', '.join(available)}")
    sizes = sizes_from(args, machine)
    text, source = read_text(args.text)
    model = models.resolve(args.model, machine)
    check_memory(machine, sizes, model)

    with fast_bf16(machine):
        run(args, machine, model, te, why_no_te, [available[name] for name in wanted], sizes, (text, source))
    return 0


def run(
    args: argparse.Namespace,
    machine: Machine,
    model: models.Model,
    te: types.ModuleType | None,
    why_no_te: str,
    chosen: Sequence[Precision],
    sizes: Sizes,
    reading: tuple[str, str],
) -> None:
    """All tables, and the claims.

    Args:
        te: Transformer Engine, or None and `why_no_te`.
        chosen: the FP8 recipes to compare.
        reading: the text that the model reads, and where it is from.
    """
    (text, source), base = reading, bf16(te)
    settings = {"model": model.name, "text": source, "seed": args.seed, **asdict(sizes)}
    report = Report("fp8_quant.py", machine, settings, engines=("transformer-engine", "torch"))
    report.print_card()
    if te is None:
        print(f"Transformer Engine is not used: {why_no_te}. It would add FP8 products at full speed; this run uses")
        print(
            "PyTorch's float8 types"
            + ("." if machine.native_fp8 else ", and products of their values in BF16 (emulated).")
        )
    torch.manual_seed(args.seed)

    report.table("formats", "Number formats", [formats.format_row(name) for name in formats.FORMATS], FORMAT_COLUMNS)
    network, tokenizer = load_model(model, machine.device)
    windows = accuracy.windows_of(text, tokenizer, sizes.window, sizes.eval_tokens)
    layer, inputs = accuracy.hardest_input(network, list(accuracy.linears(network)), windows[0])
    errors = scaling_errors(network.get_submodule(layer).weight, inputs)
    report.table(
        "scaling", f"Quantizing {layer} of {model.name}, the layer with the largest outliers", errors, ERROR_COLUMNS
    )

    fast = [p for p in chosen if p.library is te] or [p for p in chosen if p.name == "row" and machine.native_fp8]
    gemms, speed, memory = [], [], []

    def build(precision: Precision) -> nn.Module:
        return FP8TransformerModel(sizes, precision, machine.device)

    if machine.native_fp8 and fast:
        gemms = measure_gemms(base, fast, machine, sizes)
        report.table("gemm", "Matrix products, weights quantized once, CUDA graphs", gemms, gemm_columns(fast))
    for precision in fast or chosen:
        held, rows = measure_stack(build, precision, machine, sizes, args.seed)
        memory.append(held)
        speed += rows
    shape = f"{sizes.layers} blocks of width {sizes.hidden}"
    report.table("memory", f"Weights of {shape}, {sizes.prefill:,} tokens", memory, MEMORY_COLUMNS)
    if speed:
        title = (
            f"Speed of {shape}, prefill in sequences of {sizes.sequence}, decode at {sizes.context} tokens of context"
        )
        report.table("stack", title, speed, STACK_COLUMNS)

    readings = accuracy.measure_accuracy(network, windows, base, chosen, sizes)
    what = f"{model.name} reading {source}, windows of {sizes.window} tokens"
    report.table("accuracy", what, readings, accuracy.ACCURACY_COLUMNS)
    report.claims(claims(memory, speed, readings, "no FP8 units here: an emulated product is slower than BF16"))
    report.save(args.json)
    if args.plot:
        plot(args.plot, errors, gemms, [p.name for p in fast], readings)


if __name__ == "__main__":
    cli.run(main)
