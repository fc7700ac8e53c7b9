"""What the routers of a trained model choose while it reads text."""

import torch
import torch.nn as nn

from ch16.parts.moe_benchmark.experts import Routing, route
from common.cli import CannotRun, first_line
from common.gpu import Machine
from common.models import Model
from common.text import load_model, token_windows

WINDOW = 256  # tokens read at a time
CHOICE_BIASES = ("e_score_correction_bias", "expert_bias")  # added to an expert's score for the choice alone


def trained_routing(network: nn.Module, ids: torch.Tensor, top_k: int) -> list[Routing]:
    """The choices of each MoE layer's router for token ids [N, length], read window by window: N x length tokens.

    Raises:
        CannotRun: the model does not give its routers' logits, or chooses by more than them.
    """
    _require_plain_choice(network)
    options = {"output_router_logits": True, "logits_to_keep": 1}
    try:
        with torch.no_grad():
            windows = [network(input_ids=window[None], **options).router_logits for window in ids]
    except (TypeError, AttributeError) as error:
        raise CannotRun(f"this model does not show its routers: {first_line(error)}") from None
    if not windows[0]:
        raise CannotRun("this model has no routers: it is not a mixture of experts")
    layers = (torch.cat(layer) for layer in zip(*windows, strict=True) if layer[0] is not None)
    return [route(logits.reshape(-1, logits.shape[-1]), top_k) for logits in layers]


def _require_plain_choice(network: nn.Module) -> None:
    """Raise CannotRun unless the largest logits alone decide which experts a token goes to.

    DeepSeek-V3 and its relatives add a bias to each expert's score that evens out the load, or choose groups of experts
    first: the largest logits alone would show a load that the model does not have.
    """
    tensors = (*network.named_parameters(), *network.named_buffers())
    if biased := [name for name, tensor in tensors if name.endswith(CHOICE_BIASES) and tensor.any()]:
        why = f"a bias for each expert ({biased[0]})"
    elif (getattr(network.config.get_text_config(), "n_group", None) or 1) > 1:
        why = "groups of experts (n_group in its config.json)"
    else:
        return
    raise CannotRun(f"this model's routers choose by {why}, not by their logits alone, which are all that is read here")


def read_with(model: Model, text: str, tokens: int, top_k: int, machine: Machine) -> list[Routing]:
    """Routing of `tokens` tokens of a text, which must have as many, in each MoE layer of a model."""
    network, tokenizer = load_model(model, machine.device, machine.dtype)
    length = min(WINDOW, tokens)
    count = -(-tokens // length)
    ids = token_windows(text[: 40 * count * length], tokenizer, count, length)  # no need to tokenize a whole book
    if ids.max() >= network.config.vocab_size:
        raise CannotRun(f"the tokenizer of {model.name} gives ids that the model does not know")
    return [layer[:tokens] for layer in trained_routing(network, ids.to(machine.device), top_k)]
