"""How a model's linear layers compute, as one value: BF16, or FP8 by a recipe, with whichever library is there.

    with precision.weights():      # layers created here hold their weights in this precision
        block = FP8TransformerBlock(...)
    with precision.compute():      # forward passes here use it
        y = block(x)

With Transformer Engine these are `te.quantized_model_init` and `te.autocast`; without, the layers of `layers.py`.
"""

import contextlib
import os
import types
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
import torch.nn as nn

from ch16.parts.fp8_quant import layers
from common.cli import CannotRun, first_line

TOKENS_MULTIPLE = 16  # what FP8 GEMMs ask of every dimension
CALIBRATED = ("_extra_state", "input_amax")  # what calibration leaves in a state dict: Transformer Engine's, and ours


@dataclass(frozen=True)
class Precision:
    """Modules to build from, and the contexts to build, calibrate and run them in."""

    name: str  # "BF16", or a recipe: "delayed", "current", "block", "row", "tuned", "weights", "unscaled"
    library: types.ModuleType  # has Linear, LayerNormLinear, LayerNormMLP
    weights: Callable[[], AbstractContextManager] = contextlib.nullcontext
    compute: Callable[[], AbstractContextManager] = contextlib.nullcontext
    calibrate: Callable[[], AbstractContextManager] | None = None  # None: the recipe needs no calibration


def transformer_engine(device: str) -> tuple[types.ModuleType | None, str]:
    """`transformer_engine.pytorch`, or None and why it cannot be used on this device ("cuda" or "cpu")."""
    if device != "cuda" or not torch.cuda.is_available():
        return None, "it needs an NVIDIA GPU"
    # Its own normalisation kernels are tuned for some widths, and 7,168 is none of them; cuDNN's are made for any.
    os.environ.setdefault("NVTE_NORM_FWD_USE_CUDNN", "1")
    try:
        import transformer_engine.pytorch as te
    except (ImportError, OSError) as error:
        return None, f"it is not installed ({first_line(error)}); run: make install GPU=1"
    usable, reason = te.is_fp8_available(return_reason=True)
    return (te, "") if usable else (None, reason)


def bf16(library: types.ModuleType | None) -> Precision:
    """BF16 on the same modules as an FP8 recipe (None: our own), so that only the precision differs."""
    return Precision("BF16", library or layers)


def filled(recipe: str, fills: layers.Fills) -> Precision:
    """One of PyTorch's own recipes with exact scales that fill a chosen share of the range."""
    return Precision(recipe, layers, weights=lambda: layers.quantized_init(recipe, fills))


def recipes(te: types.ModuleType | None) -> dict[str, Precision]:
    """The FP8 recipes that run here, by name: Transformer Engine's where it runs, and PyTorch's own."""
    own = {
        name: Precision(
            name,
            layers,
            weights=lambda name=name: layers.quantized_init(name),
            calibrate=layers.calibrating if name == "delayed" else None,
        )
        for name in layers.RECIPES
    }
    own["tuned"] = filled("tuned", (1.0, 1.0))  # until accuracy.tune has chosen
    return own | (_transformer_engine_recipes(te) if te else {})


def _transformer_engine_recipes(te: types.ModuleType) -> dict[str, Precision]:
    from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, Format

    def precision(name: str, recipe: object) -> Precision:
        return Precision(
            name,
            te,
            weights=lambda: te.quantized_model_init(enabled=True, recipe=recipe),
            compute=lambda: te.autocast(enabled=True, recipe=recipe),
        )

    @contextlib.contextmanager
    def calibrate() -> object:
        # Scales are renewed when the context ends, and only where gradients are enabled.
        with torch.enable_grad(), te.autocast(enabled=True, recipe=delayed):
            yield

    # E4M3 in the forward pass, E5M2 (more range) for gradients. The chapter's `interval` is gone from this class.
    delayed = DelayedScaling(margin=0, fp8_format=Format.HYBRID)
    found = {
        "delayed": replace(precision("delayed", delayed), calibrate=calibrate),
        "current": precision("current", Float8CurrentScaling()),
    }
    if te.is_fp8_block_scaling_available():
        found["block"] = precision("block", Float8BlockScaling())
    return found


def calibrate(model: nn.Module, precision: Precision, batches: Iterable[torch.Tensor]) -> None:
    """Let delayed scaling see what it will have to represent; other recipes need none.

    Args:
        model: with BF16 weights, on `precision.library`'s modules.
        precision: a recipe.
        batches: inputs of the model; at least two, because the first one still runs with scale 1.
    """
    if precision.calibrate is None:
        return
    for batch in batches:
        with precision.calibrate():
            model(batch)


def load_quantized(target: nn.Module, source: nn.Module, precision: Precision) -> None:
    """Fill `target`, created in `precision.weights()`, from the BF16 weights and calibrated scales of `source`.

    Raises:
        CannotRun: the two have not the same weights. Scales may be missing: not every recipe is calibrated.
    """
    state = source.state_dict()
    if precision.calibrate is None:  # the scales of another recipe mean nothing to this one
        state = {name: value for name, value in state.items() if not name.endswith(CALIBRATED)}
    with torch.no_grad():
        missing, unexpected = target.load_state_dict(state, strict=False)
    for names, what in ((missing, "no value"), (unexpected, "no place")):
        if odd := [name for name in names if not name.endswith(CALIBRATED)]:
            raise CannotRun(f"FP8 ({precision.name}): {what} for {', '.join(odd)}")


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights and scales; Transformer Engine's tensors report those of the type they stand for."""
    tensors = [*model.parameters(), *model.buffers()]
    plain = [part for t in tensors for part in (t.get_data_tensors() if hasattr(t, "get_data_tensors") else (t,))]
    return sum(t.nbytes for t in plain if t is not None)


def require_multiples(**sizes: int) -> None:
    """Raise CannotRun for a size that no FP8 GEMM takes."""
    for name, size in sizes.items():
        if size % TOKENS_MULTIPLE:
            raise CannotRun(
                f"{name} is {size}: FP8 matrix products need a multiple of {TOKENS_MULTIPLE}, "
                f"for example {max(1, round(size / TOKENS_MULTIPLE)) * TOKENS_MULTIPLE}"
            )


def pad_rows(rows: torch.Tensor) -> torch.Tensor:
    """A matrix with zero rows added until FP8 takes their number; itself where it does already."""
    missing = -rows.shape[0] % TOKENS_MULTIPLE
    return nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows


def padded_rows(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`layer` on x [..., K], with zero rows added so that FP8 takes the number of tokens, and taken away again."""
    rows = x.reshape(-1, x.shape[-1])
    y = layer(pad_rows(rows))
    return y[: rows.shape[0]].view(*x.shape[:-1], y.shape[-1])
