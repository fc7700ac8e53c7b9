"""FP8 quantization with Transformer Engine: does it halve memory, double throughput, keep accuracy?

FP8 has 4 exponent and 3 mantissa bits (E4M3) or 5 and 2 (E5M2), so a scale has to bring every tensor into a small
range. A recipe says where the scale comes from: `delayed` from tensors seen before (so it must be calibrated),
`current` from the tensor itself, `block` from each 128 values, `row` from each token.

An NVIDIA GPU from Ada on shows the speed (one GPU is used). Any machine shows formats, memory and accuracy with
PyTorch's float8 types. Without FP8 units the product is emulated: same values, no speed.

    python3 ch16/fp8_quant.py                              # formats, products, a transformer, a real model
    python3 ch16/fp8_quant.py --quick --plot fp8.png
    python3 ch16/fp8_quant.py --hidden-size 4096 --num-heads 32 --recipes delayed,current

How to read the tables: "limit" is torch._scaled_mm on operands that are FP8 already; the gap between a recipe and the
limit is the cost of making FP8 from BF16 activations. Decode is shown eager and as a CUDA graph: at a few tokens the
host takes longer to launch an FP8 layer than the GPU to run it.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse
import contextlib
import types
from collections.abc import Sequence
from dataclasses import asdict

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from ch16.parts.fp8_quant import accuracy, formats, layers, tables
from ch16.parts.fp8_quant.blocks import measure_gemms, measure_stack
from ch16.parts.fp8_quant.picture import plot
from ch16.parts.fp8_quant.precision import Precision, fast_bf16, fastest_attention, padded_rows, transformer_engine
from ch16.parts.fp8_quant.sizes import Fp8Sizes, check_memory, parser_of, sizes_from
from common import cli, models
from common.gpu import Machine, detect
from common.models import Model
from common.results import Report
from common.text import load_model, read_text

# ---- configuration ----

# FP8 / BF16: half of the weights' bytes, and the scales; twice the speed; less than 1% lost.
TARGETS = {"weight_ratio": 0.52, "speedup": 2.0, "perplexity_ratio": 1.01, "top1_lost_percent": 1.0}

# ---- mechanism ----


def recipes(te: types.ModuleType | None) -> dict[str, Precision]:
    """The FP8 recipes by name: Transformer Engine's where it runs (`te`), otherwise those of our layers."""
    found = {name: Precision(name, layers, scaling) for name, scaling in layers.RECIPES.items()}
    if te is not None:
        from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, Format

        # E4M3 in the forward pass, E5M2 (more range) for gradients. The chapter's `interval` is gone from this class.
        found["delayed"] = Precision("delayed", te, DelayedScaling(margin=0, fp8_format=Format.HYBRID))
        found["current"] = Precision("current", te, Float8CurrentScaling())
        if te.is_fp8_block_scaling_available():
            found["block"] = Precision("block", te, Float8BlockScaling())
    return found


class FP8TransformerBlock(nn.Module):
    """Pre-norm transformer block: causal attention (in BF16) and an MLP of four times the width.

    The linear layers are the chapter's qkv_proj, out_proj, mlp_fc1 and mlp_fc2. Normalisations and GELU are in the same
    modules: Transformer Engine then makes FP8 from their output in the same kernel.

    Args:
        hidden_size: width H, a multiple of 16.
        num_heads: query heads; H must divide by it.
        num_kv_heads: key and value heads (grouped-query attention); default: num_heads.
        precision: one of `recipes`, or its BF16 twin; default: delayed scaling, as in the chapter.
        device: where the weights live; default: the GPU if there is one.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        precision: Precision | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = precision or recipes(transformer_engine(device)[0])["delayed"]
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim = hidden_size // num_heads
        qkv_size = (num_heads + 2 * self.num_kv_heads) * self.head_dim
        options = {"bias": False, "params_dtype": torch.bfloat16, "device": device}

        te, recipe = self.precision.te, self.precision.recipe  # te: transformer_engine.pytorch, or our layers
        # Not in the chapter, whose layers keep BF16 weights. With gradients each layer would keep a transposed copy.
        weights = te.quantized_model_init(enabled=True, recipe=recipe) if recipe else contextlib.nullcontext()
        with torch.no_grad(), weights:
            self.qkv_proj = te.LayerNormLinear(hidden_size, qkv_size, **options)
            self.out_proj = te.Linear(hidden_size, hidden_size, **options)
            self.mlp = te.LayerNormMLP(hidden_size, 4 * hidden_size, **options)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None, position: int = 0) -> torch.Tensor:
        """x [B, S, H] to the same shape.

        Args:
            x: S > 1 tokens of a prompt at position 0, or one token at any position.
            cache: [2, B, num_kv_heads, context, head_dim]; keys and values are written at `position`.
            position: tokens already in the cache.
        """
        te, recipe = self.precision.te, self.precision.recipe
        # The chapter's fp8_autocast(fp8_recipe=...) is now called autocast(recipe=...).
        compute = te.autocast(enabled=True, recipe=recipe) if recipe else contextlib.nullcontext()
        with compute:
            qkv = padded_rows(self.qkv_proj, x)  # FP8 takes multiples of 16 rows
            x = x + padded_rows(self.out_proj, self._attention(qkv, cache, position))
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
        with fastest_attention(q):
            mixed = F.scaled_dot_product_attention(
                q, k, v, is_causal=tokens > 1, enable_gqa=self.num_kv_heads < self.num_heads
            )
        return mixed.transpose(1, 2).reshape(batch, tokens, -1)


class FP8TransformerModel(nn.Module):
    """A stack of blocks; with `precision.bf16()` it is the twin to compare with."""

    def __init__(self, sizes: Fp8Sizes, precision: Precision, device: str) -> None:
        super().__init__()
        shape = (sizes.hidden, sizes.heads, sizes.kv_heads)
        blocks = [FP8TransformerBlock(*shape, precision=precision, device=device) for _ in range(sizes.layers)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor, caches: Sequence[torch.Tensor] | None = None, position: int = 0) -> torch.Tensor:
        """x [B, S, H] to the same shape; a cache for each block, as in FP8TransformerBlock."""
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i], position)
        return x


# ---- measurement ----


def measure_blocks(results: Report, chosen: Sequence[Precision], sizes: Fp8Sizes, machine: Machine, seed: int) -> None:
    """Products and stacks of blocks in BF16 and FP8: memory everywhere, speed where the hardware multiplies FP8."""

    def build(precision: Precision) -> FP8TransformerModel:
        return FP8TransformerModel(sizes, precision, machine.device)

    fast = [p for p in chosen if p.te is not layers] or [p for p in chosen if p.name == "row" and machine.native_fp8]
    if machine.native_fp8 and fast:
        gemms = measure_gemms(fast, machine, sizes)
        title = f"Matrix products, weights quantized once, as CUDA graphs (and {fast[0].name} launched eagerly)"
        results.table("gemm", title, gemms, tables.gemm_columns(fast))
    memory, speed = [], []
    for precision in tqdm(fast or chosen, desc="blocks", leave=False, disable=None):
        held, rates = measure_stack(build, precision, machine, sizes, seed)
        memory.append(held)
        speed += rates
    shape = f"{sizes.layers} blocks of width {sizes.hidden}"
    results.table("memory", f"Weights of {shape}, {sizes.prefill:,} tokens", memory, tables.MEMORY_COLUMNS)
    if speed:
        phases = f"prefill in sequences of {sizes.sequence}, decode at {sizes.context} tokens of context"
        results.table("stack", f"Speed of {shape}, {phases}", speed, tables.STACK_COLUMNS)


def measure(
    results: Report, chosen: Sequence[Precision], model: Model, text: str, sizes: Fp8Sizes, machine: Machine
) -> None:
    """Formats, scaling on a real layer, blocks, and a real model that reads `text`."""
    settings = results.settings
    torch.manual_seed(settings["seed"])
    rows = [formats.format_row(name) for name in formats.FORMATS]
    results.table("formats", "Number formats", rows, tables.FORMAT_COLUMNS)

    network, tokenizer = load_model(model, machine.device)
    windows = accuracy.windows_of(text, tokenizer, sizes.window, sizes.eval_tokens)
    layer, inputs = accuracy.hardest_input(network, list(accuracy.linears(network)), windows[0])
    errors = formats.scaling_errors(network.get_submodule(layer).weight, inputs)
    title = f"Quantizing {layer} of {model.name}, the layer with the largest outliers"
    results.table("scaling", title, errors, tables.ERROR_COLUMNS)

    measure_blocks(results, chosen, sizes, machine, settings["seed"])

    readings = accuracy.measure_accuracy(network, windows, chosen, sizes)
    title = f"{model.name} reading {settings['text']}, windows of {sizes.window} tokens"
    results.table("accuracy", title, readings, tables.ACCURACY_COLUMNS)


# ---- main ----


def report(results: Report, model: Model, machine: Machine, args: argparse.Namespace) -> None:
    """Print the claims; write JSON and picture."""
    rows = {name: table["rows"] for name, table in results.tables.items()}
    results.claims(tables.claims(rows["memory"], rows.get("stack", []), rows["accuracy"], TARGETS))
    results.save(args.json)
    if args.plot:
        plot(args.plot, rows, model.name, machine)


def main() -> int:
    """Measure formats, products, a stack of blocks and a real model; print the claims."""
    args = parser_of(__doc__).parse_args()
    machine = detect(args.device)
    sizes = sizes_from(args, machine)
    text, source = read_text(args.text)
    model = models.resolve(args.model, machine)
    check_memory(machine, sizes, model)
    te, why_no_te = transformer_engine(machine.device)
    available = recipes(te)

    settings = {"model": model.name, "text": source, "seed": args.seed, **asdict(sizes)}
    results = Report("fp8_quant.py", machine, settings, engines=("transformer-engine", "torch"), wide=args.wide)
    results.print_card()
    if te is None:
        products = "" if machine.native_fp8 else ", and products of their values in BF16 (emulated)"
        print(f"Transformer Engine is not used: {why_no_te}. It would add FP8 products at full speed;")
        print(f"this run uses PyTorch's float8 types{products}.")
    with fast_bf16(machine):
        measure(results, [available[name] for name in args.recipes], model, text, sizes, machine)
    report(results, model, machine, args)
    return 0


if __name__ == "__main__":
    cli.run(main)
