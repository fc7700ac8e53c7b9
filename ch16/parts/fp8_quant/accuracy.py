"""Does FP8 cost accuracy? A real model reads real text in BF16 and in FP8 and is scored on each next token.

Perplexity is exp(mean of -log p(next token)). Windows do not overlap; the first token of a window is not scored.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from tqdm import tqdm

from ch16.parts.fp8_quant import layers as our_layers
from ch16.parts.fp8_quant.precision import Precision, calibrate, held_bytes, load_quantized, require_multiples
from ch16.parts.fp8_quant.sizes import Fp8Sizes
from common.cli import CannotRun
from common.text import token_windows

BF16_ENDS = (1, 2, 4)  # so many first and last blocks are left in BF16
CALIBRATION_WINDOWS = 4  # the last ones; delayed scaling sees them, and they are not scored
LOGITS_ROWS = 128  # tokens whose logits exist at a time: 128 x 49,152 floats stay in the cache


def windows_of(text: str, tokenizer: object, length: int, tokens: int) -> torch.Tensor:
    """The text's first token ids as windows [N, length]: at least `tokens` tokens to score, then those to calibrate."""
    count = math.ceil(tokens / (length - 1)) + CALIBRATION_WINDOWS
    return token_windows(text, tokenizer, count, length, f" to score {tokens:,}")


@dataclass(frozen=True)
class Scores:
    """A model's reading of a text, per scored token: its loss in nats, and the token that the model ranked first."""

    loss: torch.Tensor  # [T]
    choice: torch.Tensor  # [T]
    truth: torch.Tensor  # [T]

    def perplexity(self, tokens: int | None = None) -> float:
        """exp(mean loss) of the first `tokens` scored tokens, or of all."""
        return math.exp(self.loss[:tokens].mean().item())

    def top1_percent(self, tokens: int | None = None) -> float:
        """Share of tokens that the model ranked first."""
        return 100 * (self.choice[:tokens] == self.truth[:tokens]).float().mean().item()


def compare(scores: Scores, reference: Scores) -> dict[str, float]:
    """A reading against the reference's reading of the same tokens, by keys of ACCURACY_COLUMNS."""
    tokens = len(scores.loss)
    right = reference.top1_percent(tokens)
    return {
        "tokens": tokens,
        "perplexity": scores.perplexity(),
        "perplexity_ratio": scores.perplexity() / reference.perplexity(tokens),
        "agreement_percent": 100 * (scores.choice == reference.choice[:tokens]).float().mean().item(),
        "top1_percent": scores.top1_percent(),
        "top1_lost_percent": 100 * (1 - scores.top1_percent() / right) if right else 0.0,
    }


@torch.no_grad()
def score(model: nn.Module, windows: torch.Tensor, batch: int, precision: Precision, label: str) -> Scores:
    """Read token ids [N, L], `batch` windows at a time, and score each next token; `label` is for the progress bar."""
    device = next(model.parameters()).device
    head = model.get_output_embeddings()
    losses, choices = [], []
    progress = tqdm(total=windows.numel(), unit="tok", desc=label, leave=False, disable=None)
    with progress, precision.compute():
        for chunk in windows.split(batch):
            chunk = chunk.to(device)
            hidden = model.base_model(chunk).last_hidden_state  # [B, L, H]
            rows, truth = hidden[:, :-1].flatten(0, 1), chunk[:, 1:].flatten()
            for h, t in zip(rows.split(LOGITS_ROWS), truth.split(LOGITS_ROWS), strict=True):
                logits = head(h).float()
                losses.append(nn.functional.cross_entropy(logits, t, reduction="none").cpu())
                choices.append(logits.argmax(-1).cpu())
            progress.update(chunk.numel())
    return Scores(torch.cat(losses), torch.cat(choices), windows[:, 1:].flatten())


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are quantized, by name: all but the output head, which stays in BF16 as in vLLM.

    CannotRun if there are none, or FP8 cannot take their sizes.
    """
    head = model.get_output_embeddings()
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if not found:
        raise CannotRun(f"{type(model).__name__} has no linear layers (torch.nn.Linear) to convert to FP8")
    for name, linear in found.items():
        require_multiples(**{f"the input of {name}": linear.in_features, f"its output ({name})": linear.out_features})
    return found


def convert(
    model: nn.Module, names: Sequence[str], precision: Precision, calibration: Sequence[torch.Tensor]
) -> Callable[[], None]:
    """Replace the layers `names` by FP8 layers without a BF16 copy; the function that comes back restores them.

    `calibration` is token ids for delayed scaling, at least two batches; empty leaves its scales at 1.
    """
    originals = {name: model.get_submodule(name) for name in names}

    def build(original: nn.Linear) -> nn.Module:
        options = {"params_dtype": original.weight.dtype, "device": original.weight.device}
        options["bias"] = original.bias is not None
        if precision.te is our_layers:  # its weights are replaced at once: random ones would take seconds
            options["init_method"] = nn.init.zeros_
        return precision.te.Linear(original.in_features, original.out_features, **options)

    if precision.calibrated and len(calibration):
        for name, original in originals.items():  # the same weights, in layers that can be calibrated
            layer = build(original).requires_grad_(False)
            layer.weight, layer.bias = original.weight, original.bias
            model.set_submodule(name, layer)
        calibrate(model, precision, calibration)
    for name, original in originals.items():
        with torch.no_grad(), precision.weights():
            layer = build(original)
        load_quantized(layer, model.get_submodule(name), precision)
        model.set_submodule(name, layer.requires_grad_(False))

    def restore() -> None:
        for name, original in originals.items():
            model.set_submodule(name, original)

    return restore


@torch.no_grad()
def hardest_input(model: nn.Module, names: Sequence[str], window: torch.Tensor) -> tuple[str, torch.Tensor]:
    """The linear layer whose input has the largest outliers (max over root mean square), and that input [T, K]."""
    hardest: tuple[float, str, torch.Tensor | None] = (0.0, "", None)

    def look(name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal hardest
        x = inputs[0].flatten(0, -2).float()
        ratio = (x.abs().max() / x.square().mean().sqrt()).item()
        if ratio > hardest[0]:
            hardest = (ratio, name, x.to(torch.bfloat16))

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(look, name)) for name in names]
    model.base_model(window.to(next(model.parameters()).device)[None])
    for hook in hooks:
        hook.remove()
    return hardest[1], hardest[2]


def inner(names: Sequence[str], ends: int) -> list[str]:
    """The layers of all blocks but the first and last `ends`; a block is the first number in a layer's name."""
    block = {name: int(number[0]) for name in names if (number := re.findall(r"\.(\d+)\.", name))}
    last = max(block.values(), default=-1)
    return [name for name in block if ends <= block[name] <= last - ends]


def measure_accuracy(
    network: nn.Module, windows: torch.Tensor, precisions: Sequence[Precision], sizes: Fp8Sizes
) -> list[dict]:
    """Rows of ACCURACY_COLUMNS: a model in BF16 and by each recipe, on the same text.

    All recipes read the first `trial_tokens` of `windows`. The best of those that multiply in FP8 is tried again with
    some of the first and last blocks left in BF16, as is usual for small models. The best of all reads everything, in
    the last row. The network is unchanged afterwards.
    """
    scored, calibration = windows[:-CALIBRATION_WINDOWS], windows[-CALIBRATION_WINDOWS:]
    examples = calibration.to(next(network.parameters()).device).chunk(2)
    trial = scored[: math.ceil(sizes.trial_tokens / (sizes.window - 1))]
    names = list(linears(network))
    bf16_bytes = sum(held_bytes(network.get_submodule(name)) for name in names)
    reference = score(network, scored, sizes.batch, Precision("BF16"), "BF16")

    def read(
        precision: Precision, label: str, text: torch.Tensor, converted: Sequence[str], seen: Sequence = examples
    ) -> dict:
        restore = convert(network, converted, precision, seen)
        held = sum(held_bytes(network.get_submodule(name)) for name in names)
        scores = score(network, text, sizes.batch, precision, label)
        restore()
        return {"recipe": label, "weight_ratio": held / bf16_bytes, **compare(scores, reference)}

    best_of = partial(min, key=lambda attempt: attempt[0]["perplexity"])
    rows, tried = [], []  # tried, with products in FP8: the row, its recipe, the layers that are in FP8
    for precision in precisions:
        if precision.calibrated:
            rows.append(read(precision, f"{precision.name}, not calibrated", trial, names, seen=[]))
        rows.append(read(precision, precision.name, trial, names))
        if precision.name != "weights":
            tried.append((rows[-1], precision, names))
    if tried:
        _, precision, _ = best_of(tried)
        for ends in BF16_ENDS:
            if middle := inner(names, ends):
                rows.append(read(precision, f"{precision.name}, first and last {ends} BF16", trial, middle))
                tried.append((rows[-1], precision, middle))
        row, _, converted = best_of(tried)
        if len(trial) == len(scored):  # it has read everything already
            rows.remove(row)
        else:
            row = read(precision, row["recipe"], scored, converted)
        rows.append(row)
    whole = {"tokens": len(reference.loss), "perplexity": reference.perplexity(), "weight_ratio": 1.0}
    return [{"recipe": "BF16", **whole, "top1_percent": reference.top1_percent()}, *rows]
