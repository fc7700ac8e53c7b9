"""Before anything slow: do these models go together, and is there room for prompt, answer and draft?"""

from typing import Any

from ch16.parts.speculative_decoding.sizes import SpeculationSizes
from ch16.parts.speculative_decoding.texts import TASKS, prompts
from common.cli import CannotRun, first_line
from common.models import Model
from common.text import load_model

Texts = dict[str, list[list[int]]]  # prompts by the name of the text, as token ids


def checked_texts(model: Model, draft: Model | None, sizes: SpeculationSizes) -> Texts:
    """The tasks, as token ids of the model.

    Raises:
        CannotRun: the draft does not fit the model, or an answer has no room in the context.
    """
    check_rollback(model)
    tokenizer = load_tokenizer(model)
    texts = {name: prompts(tokenizer, tasks[: sizes.tasks]) for name, tasks in TASKS.items()}
    needed, room = context_needed(texts, sizes), min(m.max_context for m in (model, draft) if m)
    if needed > room:
        raise CannotRun(f"prompt, answer and draft need {needed:,} tokens of context, and there is room for {room:,}")
    if draft is not None:
        check_draft(model, draft)
    return texts


def context_needed(texts: Texts, sizes: SpeculationSizes) -> int:
    """The longest prompt, its answer, and a draft that goes beyond it, in tokens."""
    longest = max(len(prompt) for requests in texts.values() for prompt in requests)
    return longest + max(sizes.tokens, sizes.loop_tokens) + max(sizes.gammas)


def load_tokenizer(model: Model) -> Any:
    """The tokenizer of a model.

    Raises:
        CannotRun: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.path)
    except Exception as error:  # a dozen of exceptions; each says in its first line what is wrong
        raise CannotRun(f"cannot load the tokenizer of '{model.name}': {first_line(error)}") from None


def check_rollback(model: Model) -> None:
    """Whether the KV cache of a model can be cut at any token.

    Raises:
        CannotRun: it has layers whose state cannot (sliding windows, linear attention).
    """
    kinds = set(model.config.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise CannotRun(f"the cache of {model.name} cannot be rolled back: it has layers of {', '.join(sorted(kinds))}")


def check_draft(target: Model, draft: Model) -> None:
    """Whether one model can draft for another.

    Raises:
        CannotRun: other tokens, or a larger model.
    """
    check_rollback(draft)
    same = load_tokenizer(draft).get_vocab() == load_tokenizer(target).get_vocab()
    if not same or draft.vocab_size != target.vocab_size:
        raise CannotRun(f"{draft.name} cannot draft for {target.name}: their tokenizers do not match")
    sizes = [sum(p.numel() for p in load_model(model, "meta")[0].parameters()) / 1e6 for model in (target, draft)]
    if sizes[1] > sizes[0]:
        raise CannotRun(
            f"{draft.name} is larger than {target.name}, {sizes[1]:,.0f} million parameters against "
            f"{sizes[0]:,.0f}: it would draft slower than the target decodes"
        )
