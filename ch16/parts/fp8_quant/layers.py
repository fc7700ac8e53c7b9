"""Linear layers with FP8 weights in plain PyTorch: what Transformer Engine's layers do, to read and to run anywhere.

`Linear`, `LayerNormLinear`, `LayerNormMLP`, `quantized_model_init` and `autocast` have the names of their counterparts
in `transformer_engine.pytorch`, as far as the chapter's block uses them: the block is written once for both.

The product: a GPU with FP8 units computes `torch._scaled_mm` on the FP8 values. Elsewhere it is emulated: bfloat16
holds every FP8 value exactly, so a bfloat16 product with float32 accumulation is the FP8 product, only slower.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.fp8 import ACTIVATION_BLOCK, WEIGHT_BLOCK, Quantized, decode, dequantize, quantize
from common.gpu import has_fp8_units


@dataclass(frozen=True)
class Scaling:
    """A recipe: which values share a scale."""

    weights: str
    activations: str


RECIPES = {
    "delayed": Scaling("tensor", "static"),  # the activations' scale comes from calibration
    "current": Scaling("tensor", "tensor"),  # from the tensor itself
    "block": Scaling("block", "block"),  # 128 x 128 weights, 1 x 128 activations
    "row": Scaling("row", "row"),  # a scale for each output channel and each token
    "weights": Scaling("row", "bf16"),  # FP8 weights, BF16 activations and products: memory only
    "unscaled": Scaling("none", "none"),
}

random_weight = partial(nn.init.normal_, std=0.023)  # as Transformer Engine fills weights

_weights_in: ContextVar[Scaling | None] = ContextVar("weights_in", default=None)
_computing_in: ContextVar[Scaling | None] = ContextVar("computing_in", default=None)


def quantized_model_init(enabled: bool = True, recipe: Scaling | None = None) -> AbstractContextManager:
    """Layers created inside hold FP8 weights only."""
    return _setting(_weights_in, recipe if enabled else None)


def autocast(enabled: bool = True, recipe: Scaling | None = None) -> AbstractContextManager:
    """Inside, layers with FP8 weights compute in FP8, and layers with BF16 weights calibrate.

    A calibrating layer remembers the largest input that it sees; it computes in BF16, Transformer Engine's in FP8.
    """
    return _setting(_computing_in, recipe if enabled else None)


@contextlib.contextmanager
def _setting(variable: ContextVar, value: Scaling | None) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def scaled_product(x: Quantized, weight: Quantized) -> torch.Tensor:
    """x [M, K] times the transpose of weight [N, K], in bfloat16: [M, N]."""
    if x.block or weight.block:
        return dequantize(x) @ dequantize(weight).t()
    device = x.values.device
    if device.type == "cuda" and has_fp8_units(torch.cuda.get_device_capability(device)):
        one_for_all = x.inverse.dim() == 0
        scales = (x.inverse, weight.inverse if one_for_all else weight.inverse.t())
        return torch._scaled_mm(x.values, weight.values.t(), *scales, out_dtype=torch.bfloat16)
    product = decode(x.values) @ decode(weight.values).t()
    return product * x.inverse.view(-1, 1).to(product.dtype) * weight.inverse.flatten().to(product.dtype)  # exact


class Linear(nn.Module):
    """y = x W^T + b, with W in bfloat16 or, created inside `quantized_model_init`, in FP8.

    A state dict to load holds W in bfloat16: an FP8 layer quantizes it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        params_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        init_method: Callable[[torch.Tensor], torch.Tensor] = random_weight,
    ) -> None:
        super().__init__()
        self.recipe, self.dtype = _weights_in.get(), params_dtype
        where = {"dtype": params_dtype, "device": device}
        self.bias = nn.Parameter(torch.zeros(out_features, **where), requires_grad=False) if bias else None
        self.register_buffer("input_amax", torch.zeros((), device=device))  # 0: not calibrated
        weight = init_method(torch.empty(out_features, in_features, **where))
        if self.recipe is None:
            self.weight = nn.Parameter(weight, requires_grad=False)
        else:
            self._keep(weight)

    def _keep(self, weight: torch.Tensor) -> None:
        quantized = quantize(weight, self.recipe.weights, block=WEIGHT_BLOCK)
        self.register_buffer("weight", quantized.values, persistent=False)
        self.register_buffer("weight_inverse", quantized.inverse, persistent=False)
        self._block = quantized.block

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, metadata: dict, strict: bool, missing: list[str], *args: list[str]
    ) -> None:
        name = prefix + "weight"
        if self.recipe is not None and name in state_dict:
            self._keep(state_dict.pop(name).to(self.weight.device))
        elif self.recipe is not None:  # torch does not miss it: a layer's FP8 values are not in its state dict
            missing.append(name)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *args)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features]."""
        computing_in = _computing_in.get()
        if self.recipe is None:
            if computing_in is not None and computing_in.activations == "static":
                self.input_amax = torch.maximum(self.input_amax, x.abs().amax().float())
            return F.linear(x, self.weight, self.bias)
        weight = Quantized(self.weight, self.weight_inverse, self._block)
        rows = x.reshape(-1, x.shape[-1])
        if computing_in is None or self.recipe.activations == "bf16":
            product = rows @ dequantize(weight).t()
        else:
            product = scaled_product(self._quantized_input(rows), weight)
        product = product if self.bias is None else product + self.bias
        return product.view(*x.shape[:-1], -1)

    def _quantized_input(self, rows: torch.Tensor) -> Quantized:
        if self.recipe.activations != "static":
            return quantize(rows, self.recipe.activations, block=ACTIVATION_BLOCK)
        if self.input_amax > 0:
            return quantize(rows, "tensor", amax=self.input_amax)
        return quantize(rows, "none")  # as Transformer Engine's delayed scaling before its first update: scale 1


class LayerNormLinear(Linear):
    """Layer normalisation, then `Linear`."""

    def __init__(self, in_features: int, out_features: int, **options: object) -> None:
        super().__init__(in_features, out_features, **options)
        self.norm = nn.LayerNorm(in_features, dtype=self.dtype, device=self.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features]."""
        return super().forward(self.norm(x))


class LayerNormMLP(nn.Module):
    """Layer normalisation, a linear layer to the hidden width, GELU, and one back."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, **options: object) -> None:
        super().__init__()
        self.fc1 = LayerNormLinear(hidden_size, ffn_hidden_size, **options)
        self.fc2 = Linear(ffn_hidden_size, hidden_size, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden_size] to the same shape."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
