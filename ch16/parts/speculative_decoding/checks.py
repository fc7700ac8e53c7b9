"""Before anything slow: how much to measure, do these models go together, and is there room for their answers?"""

from dataclasses import dataclass, replace
from typing import Any

from ch16.parts.speculative_decoding.texts import TASKS, Texts, prompts
from common.cli import CannotRun, first_line
from common.gpu import Machine
from common.models import Model
from common.text import load_model


@dataclass(frozen=True)
class SpeculationSizes:
    """Tasks per text and tokens per answer, for vLLM and for the loop; gammas and batches to try; rounds."""

    tasks: int
    tokens: int
    loop_tasks: int
    loop_tokens: int
    gammas: tuple[int, ...]
    batches: tuple[int, ...]
    rounds: int  # at batch 1
    rounds_together: int  # at larger batches, which are averages already


def least_tokens(gamma: int) -> int:
    """Tokens of an answer that has room for more than one draft of `gamma` and the token after it."""
    return gamma + 2


def sizes_for(machine: Machine, quick: bool, tokens: int | None, gamma: int) -> SpeculationSizes:
    """A few seconds per figure; `gamma` is among those tried, and answers have room for it."""
    if quick:
        sizes = SpeculationSizes(2, 24, 1, 24, (1, 4, 8), (1, 16), 1, 1)
    elif machine.device == "cuda":
        sizes = SpeculationSizes(4, 128, 4, 64, (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32, 64, 128, 256), 5, 3)
    else:
        sizes = SpeculationSizes(4, 64, 2, 64, (1, 2, 4, 8, 16), (1, 4, 16, 64), 2, 1)
    tokens, loop_tokens = (max(least_tokens(gamma), tokens or usual) for usual in (sizes.tokens, sizes.loop_tokens))
    gammas = tuple(sorted({*sizes.gammas, gamma}))
    return replace(sizes, tokens=tokens, loop_tokens=loop_tokens, gammas=gammas)


def checked_texts(model: Model, draft: Model | None, sizes: SpeculationSizes) -> Texts:
    """The tasks, as token ids; CannotRun where the draft does not fit the model, or an answer the context."""
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
    """The tokenizer of a model; CannotRun where transformers cannot load it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.path)
    except Exception as error:  # a dozen of exceptions; each says in its first line what is wrong
        raise CannotRun(f"cannot load the tokenizer of '{model.name}': {first_line(error)}") from None


def check_rollback(model: Model) -> None:
    """CannotRun where a model has layers whose cache cannot be cut at any token (sliding windows, linear attention)."""
    kinds = set(model.config.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise CannotRun(f"the cache of {model.name} cannot be rolled back: it has layers of {', '.join(sorted(kinds))}")


def check_draft(target: Model, draft: Model) -> None:
    """CannotRun where one model cannot draft for another: it has other tokens, or is larger."""
    check_rollback(draft)
    same = load_tokenizer(draft).get_vocab() == load_tokenizer(target).get_vocab()
    if not same or draft.vocab_size != target.vocab_size:
        raise CannotRun(f"{draft.name} cannot draft for {target.name}: their tokenizers do not match")
    networks = [load_model(model, "meta")[0] for model in (target, draft)]
    of_target, of_draft = (sum(p.numel() for p in network.parameters()) / 1e6 for network in networks)
    if of_draft > of_target:
        than = f"{target.name}, {of_draft:,.0f} million parameters against {of_target:,.0f}"
        raise CannotRun(f"{draft.name} is larger than {than}: it would draft slower than the target decodes")
