"""A real model and real text for it, as transformers loads them."""

import importlib
from pathlib import Path

import torch
import torch.nn as nn

from common.cli import CannotRun, first_line
from common.models import Model


def load_model(model: Model, device: str, dtype: str = "bfloat16") -> tuple[nn.Module, object]:
    """The model, ready to score, and its tokenizer (None with random weights); CannotRun if it cannot be loaded.

    Device "meta" is for its structure alone, without weights. `dtype` is `Machine.dtype`, or another name of torch's.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if model.dummy or device == "meta":
            config = AutoConfig.from_pretrained(model.path)
            with torch.device(device):  # a CPU would take minutes for billions of random numbers
                network = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            return network.eval().requires_grad_(False), None
        tokenizer = AutoTokenizer.from_pretrained(model.path)
        network = AutoModelForCausalLM.from_pretrained(model.path, dtype=getattr(torch, dtype))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers and safetensors have a dozen types; their first line says what is wrong
        raise CannotRun(f"cannot load '{model.name}': {first_line(error)}") from None
    return network.to(device).eval().requires_grad_(False), tokenizer


def token_windows(text: str, tokenizer: object, count: int, length: int, purpose: str = "") -> torch.Tensor:
    """The text's first token ids as windows [count, length]; CannotRun, "... needed{purpose}", if it is too short."""
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) < count * length:
        raise CannotRun(f"the text has {len(ids):,} tokens; {count * length:,} are needed{purpose}")
    return ids[: count * length].view(count, length)


def read_text(path: str | None) -> tuple[str, str]:
    """A text and its source: a file, or the language reference that ships with Python; CannotRun without either."""
    if path is not None:
        try:
            return Path(path).read_text(), path
        except (OSError, UnicodeDecodeError) as error:
            raise CannotRun(f"cannot read the text {path}: {error}") from None
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise CannotRun("this Python came without pydoc_data, the text to read; give a file by --text") from None
    return "\n\n".join(topics[name] for name in sorted(topics)), "Python's own language reference (pydoc_data.topics)"
