"""How linear layers compute, as one value: in BF16, or in FP8 by a recipe, with Transformer Engine or our layers."""

import contextlib
import importlib.util
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ch16.parts.fp8_quant import layers
from common.cli import CannotRun, first_line
from common.gpu import Machine

TOKENS_MULTIPLE = 16  # FP8 GEMMs take multiples of it in every dimension
CALIBRATED = ("_extra_state", "input_amax")  # calibration's names in a state dict: Transformer Engine's, and ours
PRODUCTS = {F.linear, F.scaled_dot_product_attention, torch.matmul, torch.mm, torch.bmm}
PRODUCTS |= {torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm}


@dataclass(frozen=True)
class Precision:
    """A library of layers and the recipe by which they compute."""

    name: str  # "BF16", or a recipe: "delayed", "current", "block", "row", "weights", "unscaled"
    te: types.ModuleType = layers  # transformer_engine.pytorch, or our layers under the same names
    recipe: object | None = None  # the library's own; None: BF16

    @property
    def calibrated(self) -> bool:
        """Whether the recipe takes its scales from tensors seen before."""
        return self.name == "delayed"

    def bf16(self) -> "Precision":
        """BF16 on the same library's layers: the twin differs in its precision alone."""
        return replace(self, name="BF16", recipe=None)

    def weights(self) -> AbstractContextManager:
        """Layers created inside hold their weights in this precision."""
        init = self.te.quantized_model_init
        return init(enabled=True, recipe=self.recipe) if self.recipe else contextlib.nullcontext()

    def compute(self) -> AbstractContextManager:
        """Forward passes inside use this precision."""
        return self.te.autocast(enabled=True, recipe=self.recipe) if self.recipe else contextlib.nullcontext()


def transformer_engine(device: str) -> tuple[types.ModuleType | None, str]:
    """`transformer_engine.pytorch`, or None and why it cannot be used on this device ("cuda" or "cpu")."""
    if device != "cuda" or not torch.cuda.is_available():
        return None, "it needs an NVIDIA GPU"
    use_cudnn()
    try:
        import transformer_engine.pytorch as te
    except (ImportError, OSError) as error:
        return None, f"it is not installed ({first_line(error)}); run: make install GPU=1"
    usable, reason = te.is_fp8_available(return_reason=True)
    return (te, "") if usable else (None, reason)


def use_cudnn() -> None:
    """Let cuDNN normalise, and let it be PyTorch's. Transformer Engine reads both variables when it is imported.

    Its own kernels are tuned for some widths, and 7,168 is none of them: they cost 1 to 4% of prefill on an H200. It
    would take a cuDNN of the system before PyTorch's; of two versions, the graph of a norm finds the wrong half.
    """
    os.environ.setdefault("NVTE_NORM_FWD_USE_CUDNN", "1")
    nvidia = importlib.util.find_spec("nvidia")  # the folder of PyTorch's CUDA libraries, where they are packages
    for folder in (nvidia and nvidia.submodule_search_locations) or ():
        if any(Path(folder, "cudnn", "lib").glob("libcudnn.so*")):
            os.environ.setdefault("CUDNN_HOME", str(Path(folder, "cudnn")))
            return


def fastest_attention(q: torch.Tensor) -> AbstractContextManager:
    """Inside, attention on a GPU takes the fastest kernel that supports its shapes."""
    if q.device.type == "cpu":
        return contextlib.nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def calibrate(model: nn.Module, precision: Precision, batches: Iterable[torch.Tensor]) -> None:
    """Show delayed scaling the values that it will have to represent; other recipes need no calibration.

    The model has BF16 weights on `precision.te`'s layers. At least two batches: the first still runs with scale 1.
    """
    if not precision.calibrated:
        return
    for batch in batches:
        # Transformer Engine updates scales when the context ends, and only where gradients are enabled.
        with torch.enable_grad(), precision.compute():
            model(batch)


def load_quantized(target: nn.Module, source: nn.Module, precision: Precision) -> None:
    """Fill `target`, created in `precision.weights()`, from the BF16 weights and calibrated scales of `source`.

    CannotRun if their weights have different names. Scales may be missing: not every recipe is calibrated.
    """
    state = source.state_dict()
    if not precision.calibrated:  # the scales of another recipe mean nothing to this one
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
            near = max(1, round(size / TOKENS_MULTIPLE)) * TOKENS_MULTIPLE
            needed = f"FP8 matrix products need a multiple of {TOKENS_MULTIPLE}, for example {near}"
            raise CannotRun(f"{name} is {size}: {needed}")


def pad_rows(rows: torch.Tensor) -> torch.Tensor:
    """A matrix with zero rows added until FP8 takes their number."""
    missing = -rows.shape[0] % TOKENS_MULTIPLE
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def padded_rows(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`layer` on x [..., K], with zero rows added so that FP8 takes the number of tokens, and removed again."""
    rows = x.reshape(-1, x.shape[-1])
    y = layer(pad_rows(rows))
    return y[: rows.shape[0]].view(*x.shape[:-1], y.shape[-1])


def fast_bf16(machine: Machine) -> AbstractContextManager:
    """Inside, a machine without units for BF16 computes products of BF16 tensors in FP32; on others nothing changes.

    That is what the units do: the product of two BF16 numbers is exact in FP32, sums are in FP32, and the result is
    rounded once. PyTorch's own way gives the same, and took fifty times as long (AVX2, a product of 512 by 512).
    """
    return contextlib.nullcontext() if machine.native_bf16 else _ProductsInFp32()


class _ProductsInFp32(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence = (), kwargs: Mapping | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in PRODUCTS and any(_is_bf16(value) for value in args):
            return func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()}).bfloat16()
        return func(*args, **kwargs)


def _is_bf16(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16


def _wide(value: object) -> object:
    return value.float() if _is_bf16(value) else value
