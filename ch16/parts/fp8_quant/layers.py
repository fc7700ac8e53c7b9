"""Linear layers with FP8 weights in plain PyTorch: what Transformer Engine's modules do, to read and to run anywhere.

`Linear`, `LayerNormLinear` and `LayerNormMLP` have the names and constructors of their counterparts in
`transformer_engine.pytorch`, as far as the chapter's block uses them, so the block is written once for both.

The product: where a GPU has FP8 units, `torch._scaled_mm` on the FP8 values. Elsewhere it is emulated: bfloat16 holds
every FP8 value exactly, so a bfloat16 product of FP8 values with float32 accumulation is the FP8 product, only slower.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.fp8 import ACTIVATION_BLOCK, WEIGHT_BLOCK, Quantized, decode, dequantize, quantize
from common.gpu import has_fp8_units

# Recipes by the names Transformer Engine's have, and four that it has not.
#                (weights, activations)
RECIPES = {
    "delayed": ("tensor", "static"),  # the activations' scale comes from calibration
    "current": ("tensor", "tensor"),  # from the tensor itself
    "block": ("block", "block"),  # 128 x 128 weights, 1 x 128 activations
    "row": ("row", "row"),  # a scale for each output channel and each token
    "tuned": ("row", "row"),  # the same, with scales whose fill of the range was chosen by what the model then reads
    "weights": ("row", "bf16"),  # FP8 weights, BF16 activations and products: memory only
    "unscaled": ("none", "none"),
}

Fills = tuple[float | None, float | None]  # for weights and activations, as in fp8.quantize

_weights_in: ContextVar[tuple[str, Fills] | None] = ContextVar("weights_in", default=None)
_calibrating: ContextVar[bool] = ContextVar("calibrating", default=False)


@contextlib.contextmanager
def quantized_init(recipe: str, fills: Fills = (None, None)) -> Iterator[None]:
    """Layers created inside hold FP8 weights only, and compute with them by `recipe`, a key of RECIPES."""
    token = _weights_in.set((recipe, fills))
    try:
        yield
    finally:
        _weights_in.reset(token)


@contextlib.contextmanager
def calibrating() -> Iterator[None]:
    """Layers with full-precision weights remember the largest input they see inside."""
    token = _calibrating.set(True)
    try:
        yield
    finally:
        _calibrating.reset(token)


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
    exact = product.dtype if x.power_of_two and weight.power_of_two else torch.float32
    return (product * x.inverse.view(-1, 1).to(exact) * weight.inverse.flatten().to(exact)).to(product.dtype)


class Linear(nn.Module):
    """y = x W^T + b, with W in bfloat16 or, created inside `quantized_init`, in FP8.

    A state dict always holds W in bfloat16 on the way in: an FP8 layer quantizes what it loads.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        params_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.recipe, self.fills = _weights_in.get() or (None, (None, None))
        where = {"dtype": params_dtype, "device": device}
        self.bias = nn.Parameter(torch.zeros(out_features, **where), requires_grad=False) if bias else None
        self.register_buffer("input_amax", torch.zeros((), device=device))  # 0: not calibrated
        if self.recipe is None:
            weight = torch.empty(out_features, in_features, **where)
            self.weight = nn.Parameter(nn.init.normal_(weight, std=0.023), requires_grad=False)
        else:
            self._keep(torch.zeros(out_features, in_features, **where))

    def _keep(self, weight: torch.Tensor) -> None:
        weights, _ = RECIPES[self.recipe]
        quantized = quantize(weight, weights, block=WEIGHT_BLOCK, fill=self.fills[0])
        self.register_buffer("weight", quantized.values, persistent=False)
        self.register_buffer("weight_inverse", quantized.inverse, persistent=False)
        self._weight = {"block": quantized.block, "power_of_two": quantized.power_of_two}

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
        if self.recipe is None:
            if _calibrating.get():
                self.input_amax = torch.maximum(self.input_amax, x.abs().amax().float())
            return F.linear(x, self.weight, self.bias)
        weight = Quantized(self.weight, self.weight_inverse, **self._weight)
        rows = x.reshape(-1, x.shape[-1])
        if RECIPES[self.recipe][1] == "bf16":
            product = rows @ dequantize(weight).t()
        else:
            product = scaled_product(self._quantized_input(rows), weight)
        product = product if self.bias is None else product + self.bias
        return product.view(*x.shape[:-1], -1)

    def _quantized_input(self, rows: torch.Tensor) -> Quantized:
        _, activations = RECIPES[self.recipe]
        if activations != "static":
            return quantize(rows, activations, block=ACTIVATION_BLOCK, fill=self.fills[1])
        if self.input_amax > 0:
            return quantize(rows, "tensor", amax=self.input_amax)
        return quantize(rows, "none")  # as Transformer Engine's delayed scaling before its first update: scale 1


class LayerNormLinear(Linear):
    """Layer normalisation, then `Linear`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        params_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, params_dtype, device)
        self.norm = nn.LayerNorm(in_features, dtype=params_dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features]."""
        return super().forward(self.norm(x))


class LayerNormMLP(nn.Module):
    """Layer normalisation, a linear layer to the hidden width, GELU, and one back."""

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        bias: bool = True,
        params_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = LayerNormLinear(hidden_size, ffn_hidden_size, bias, params_dtype, device)
        self.fc2 = Linear(ffn_hidden_size, hidden_size, bias, params_dtype, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden_size] to the same shape."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
