"""Does FP8 cost accuracy? A real model reads real text in BF16 and in FP8, and both are scored on each next token.

Perplexity is exp(mean of -log p(next token)). Windows do not overlap; the first token of a window is not scored.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from tqdm import tqdm

from ch16.parts.fp8_quant.precision import Precision, calibrate, filled, held_bytes, load_quantized, require_multiples
from ch16.parts.fp8_quant.sizes import Sizes
from common.cli import CannotRun
from common.results import Column
from common.text import token_windows

BF16_ENDS = (1, 2, 4)  # so many first and last blocks are left in BF16
CALIBRATION_TOKENS = 8_000  # not scored: delayed scaling sees four windows of them, tuning reads them all
CALIBRATION_WINDOWS = 4
FILLS = [2 ** (-i / 8) for i in range(8)]  # from one power of two to the next; a whole one would change nothing
LOGITS_ROWS = 128  # tokens whose logits exist at a time: 128 x 49,152 floats stay in the cache


def windows_of(text: str, tokenizer: object, length: int, tokens: int) -> torch.Tensor:
    """The text's first token ids as windows [N, length] that score at least `tokens` tokens, and some to calibrate.

    Raises:
        CannotRun: the text is too short.
    """
    count = math.ceil(tokens / (length - 1)) + _kept_back(length)
    return token_windows(text, tokenizer, count, length, f" to score {tokens:,}")


def _kept_back(length: int) -> int:
    """How many windows of this length, the last ones, are for calibration."""
    return math.ceil(CALIBRATION_TOKENS / length)


@dataclass(frozen=True)
class Scores:
    """A model's reading of a text, one entry a scored token: its loss in nats, the token it would have chosen."""

    loss: torch.Tensor  # [T]
    choice: torch.Tensor  # [T]
    truth: torch.Tensor  # [T]

    def perplexity(self, tokens: int | None = None) -> float:
        """exp(mean loss) of the first `tokens` scored tokens, or of all."""
        return math.exp(self.loss[:tokens].mean().item())

    def top1_percent(self, tokens: int | None = None) -> float:
        """Share of tokens that the model would have chosen."""
        return 100 * (self.choice[:tokens] == self.truth[:tokens]).float().mean().item()


def compare(scores: Scores, reference: Scores) -> dict[str, float]:
    """A reading beside the reference's reading of the same first tokens."""
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
    """Read windows [N, L] and score each next token.

    Args:
        model: a causal LM of transformers.
        windows: token ids.
        batch: windows at a time.
        precision: what the model's linear layers compute in.
        label: for the progress bar.
    """
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

    Raises:
        CannotRun: there are none, or FP8 cannot take their sizes.
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
    """Replace linear layers by FP8 ones that hold no BF16 copy, calibrated first where the recipe needs it.

    Args:
        model: changed in place.
        names: which layers, as `linears` names them.
        precision: a recipe.
        calibration: token ids for delayed scaling, at least two batches; empty leaves its scales at 1.

    Returns:
        A function that puts the original layers back.
    """
    originals = {name: model.get_submodule(name) for name in names}

    def build(original: nn.Linear) -> nn.Module:
        size = (original.in_features, original.out_features)
        return precision.library.Linear(
            *size, bias=original.bias is not None, params_dtype=original.weight.dtype, device=original.weight.device
        )

    if precision.calibrate and len(calibration):
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

    def look(name: str) -> Callable:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            nonlocal hardest
            x = inputs[0].flatten(0, -2).float()
            ratio = (x.abs().max() / x.square().mean().sqrt()).item()
            if ratio > hardest[0]:
                hardest = (ratio, name, x.to(torch.bfloat16))

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    model.base_model(window.to(next(model.parameters()).device)[None])
    for hook in hooks:
        hook.remove()
    return hardest[1], hardest[2]


ACCURACY_COLUMNS = (
    Column("recipe", "recipe"),
    Column("tokens", "tokens", ",d"),
    Column("perplexity", "perplexity", ".3f"),
    Column("perplexity_ratio", "FP8 / BF16", ".4f"),
    Column("agreement_percent", "same choice as BF16 %", ".1f"),
    Column("top1_percent", "right choice %", ".2f"),
    Column("top1_lost_percent", "of it lost %", ".2f"),
    Column("weight_ratio", "weight bytes / BF16", ".3f"),
)


def inner(names: Sequence[str], ends: int) -> list[str]:
    """The layers of all blocks but the first and last `ends`; a block is the first number in a layer's name."""
    block = {name: int(number[0]) for name in names if (number := re.findall(r"\.(\d+)\.", name))}
    last = max(block.values(), default=-1)
    return [name for name in block if ends <= block[name] <= last - ends]


def tune(network: nn.Module, names: Sequence[str], windows: torch.Tensor, batch: int) -> Precision:
    """Row scaling with the fill of the range that reads `windows` best: for weights first, then for activations.

    FP8's steps double at each power of two, so where a layer's typical values lie between two of them decides how
    finely they are rounded, and the model says better than any one layer which place is good.
    """

    def loss(precision: Precision) -> float:
        restore = convert(network, names, precision, [])
        scores = score(network, windows, batch, precision, "tuning")
        restore()
        return scores.loss.mean().item()

    weights = min(FILLS, key=lambda fill: loss(filled("weights", (fill, None))))
    return filled("tuned", min(((weights, fill) for fill in FILLS), key=lambda fills: loss(filled("tuned", fills))))


def measure_accuracy(
    network: nn.Module, windows: torch.Tensor, base: Precision, precisions: Sequence[Precision], sizes: Sizes
) -> list[dict]:
    """Perplexity and choices of a model in BF16 and by each recipe, on the same text.

    All recipes read the first `trial_tokens`. The best of those that multiply in FP8 is tried again with some of the
    first and last blocks left in BF16, as is usual for small models; the best of all reads everything, last row.
    The last windows calibrate delayed scaling and tune row scaling, and are not scored.

    Args:
        network: a causal LM in BF16; unchanged afterwards.
        windows: token ids [N, window].
        base: how BF16 runs.
        precisions: recipes to try.
        sizes: trial_tokens, batch, window.
    """
    kept_back = _kept_back(sizes.window)
    scored, calibration = windows[:-kept_back], windows[-kept_back:]
    examples = calibration[:CALIBRATION_WINDOWS].to(next(network.parameters()).device).chunk(2)
    trial = scored[: math.ceil(sizes.trial_tokens / (sizes.window - 1))]
    names = list(linears(network))
    bf16_bytes = sum(held_bytes(network.get_submodule(name)) for name in names)
    reference = score(network, scored, sizes.batch, base, "BF16")

    def read(precision: Precision, label: str, text: torch.Tensor, layers: Sequence[str], calibrated: bool) -> dict:
        restore = convert(network, layers, precision, examples if calibrated else [])
        held = sum(held_bytes(network.get_submodule(name)) for name in names)
        scores = score(network, text, sizes.batch, precision, label)
        restore()
        return {"recipe": label, "weight_ratio": held / bf16_bytes, **compare(scores, reference)}

    rows, best = [], None
    for precision in precisions:
        if precision.name == "tuned":
            precision = tune(network, names, calibration, sizes.batch)
        if precision.calibrate:
            rows.append(read(precision, f"{precision.name}, not calibrated", trial, names, False))
        rows.append(read(precision, precision.name, trial, names, True))
        if precision.name != "weights" and (best is None or rows[-1]["perplexity"] < best[0]["perplexity"]):
            best = (rows[-1], precision, names)
    for ends in BF16_ENDS if best else ():
        _, precision, _ = best
        if middle := inner(names, ends):
            label = f"{precision.name}, first and last {ends} BF16"
            rows.append(read(precision, label, trial, middle, True))
            if rows[-1]["perplexity"] < best[0]["perplexity"]:
                best = (rows[-1], precision, middle)
    if best:
        row, precision, layers = best
        if len(trial) == len(scored):  # it has read everything already
            rows.remove(row)
        else:
            row = read(precision, row["recipe"], scored, layers, True)
        rows.append(row)
    whole = {"tokens": len(reference.loss), "perplexity": reference.perplexity(), "weight_ratio": 1.0}
    return [{"recipe": "BF16", **whole, "top1_percent": reference.top1_percent()}, *rows]
