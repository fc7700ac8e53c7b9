"""What may stand in the body of a request, and /generate in terms of /v1/completions."""

import json
import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

# The chapter's sampling parameters: those of the demo, and the defaults of /generate.
TEMPERATURE = 0.8
TOP_P = 0.95
MAX_TOKENS = 512

MAX_INTEGER = 2**63 - 1  # what the engine can hold
# vllm-router adds them to every request, for engines that know them. vLLM ignores them.
ROUTER_FIELDS = ("no_stop_trim", "return_hidden_states", "separate_reasoning", "stream_reasoning")


class Refused(Exception):
    """An answer of 4xx or 503 given before vLLM sees the request."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})


class GenerateRequest(BaseModel):
    """Body of POST /generate."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1)
    max_tokens: int = Field(default=MAX_TOKENS, ge=1)
    temperature: float = Field(default=TEMPERATURE, ge=0, le=2)
    top_p: float = Field(default=TOP_P, gt=0, le=1)
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)  # lower goes first
    stream: bool = False

    def as_completion(self, model: str) -> dict:
        """The same request for /v1/completions."""
        body = {"model": model, **self.model_dump()}
        return body | {"stream_options": {"include_usage": True}} if self.stream else body


def generate_answer(completion: Mapping) -> dict:
    """The answer of /generate, from a whole answer of /v1/completions."""
    choice, usage = completion["choices"][0], completion["usage"]
    return {
        "text": choice["text"],
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "finish_reason": choice["finish_reason"],
    }


class GenerateEvents:
    """Server-sent events of /v1/completions, rewritten as those of /generate.

    Each event carries `text`; the last one also `finish_reason` and the token counts; then `[DONE]`.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._finish_reason: str | None = None

    def feed(self, chunk: bytes) -> bytes:
        """Take bytes as they arrive (an event may be cut anywhere) and return the events that are complete."""
        *events, self._buffer = (self._buffer + chunk).split(b"\n\n")
        return b"".join(self._rewrite(event) for event in events)

    def _rewrite(self, event: bytes) -> bytes:
        data = event.removeprefix(b"data: ")
        if data == event or data == b"[DONE]":  # a comment, or the end
            return event + b"\n\n"
        content = json.loads(data)
        if "choices" not in content:  # an error in mid-stream
            return event + b"\n\n"
        text = "".join(choice["text"] for choice in content["choices"])
        for choice in content["choices"]:
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
        answer: dict = {"text": text}
        if usage := content.get("usage"):
            answer["finish_reason"] = self._finish_reason
            answer |= {key: usage[key] for key in ("prompt_tokens", "completion_tokens")}
        return b"data: " + json.dumps(answer).encode() + b"\n\n"


def parse_body(body: bytes) -> dict:
    """The JSON object in `body`.

    Raises:
        Refused: not JSON, not an object, or with a number or a text that no engine can hold
            (NaN, beyond the range of a float, more than 64 bits, half a surrogate pair).
    """

    def integer(digits: str) -> int:
        value = int(digits) if len(digits) < 24 else MAX_INTEGER + 1
        if not -MAX_INTEGER - 1 <= value <= MAX_INTEGER:
            raise Refused(400, "an integer in the body has more than 64 bits")
        return value

    def fraction(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise Refused(400, "a number in the body is too large for a float")
        return value

    def constant(name: str) -> None:
        raise Refused(400, f"{name} is not a JSON number")

    try:
        content = json.loads(body, parse_int=integer, parse_float=fraction, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise Refused(400, "the body must be a JSON object")
    if b"\\ud" in body.lower():
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise Refused(400, "a string in the body holds half a surrogate pair") from None
    return content


def known_fields() -> dict[str, frozenset[str]]:
    """For each JSON endpoint the fields that vLLM or the OpenAI API defines, or vllm-router adds.

    A field that neither knows is a typing error, and ignoring it would answer another question than was asked.
    """
    from openai.types import completion_create_params
    from openai.types.chat import completion_create_params as chat_create_params
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    def names(model: type[BaseModel], openai_params: type) -> frozenset[str]:
        aliases = {f.alias for f in model.model_fields.values() if f.alias}
        return frozenset({*model.model_fields, *aliases, *openai_params.__annotations__, "stream", *ROUTER_FIELDS})

    return {
        "/v1/completions": names(CompletionRequest, completion_create_params.CompletionCreateParamsBase),
        "/v1/chat/completions": names(ChatCompletionRequest, chat_create_params.CompletionCreateParamsBase),
    }


def sequences(content: Mapping) -> int:
    """How many sequences a request asks for: prompts (or, in a batch, conversations) times `n`.

    Raises:
        Refused: `n` is not a whole number. vLLM would read "8" as 8, and the bound on the queue would not.
    """
    prompt, messages, n = content.get("prompt"), content.get("messages"), content.get("n")
    if n is not None and type(n) is not int:
        raise Refused(400, "n must be a whole number")
    count = 1
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        count = len(prompt)
    elif isinstance(messages, list) and messages and isinstance(messages[0], list):
        count = len(messages)
    return count * max(1, n or 1)


def prompt_chars(content: Mapping) -> int:
    """Characters of all texts that are read as the prompt; a token id counts as one."""
    total, rest = 0, [content.get(name) for name in ("prompt", "messages", "input", "system", "instructions")]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, Mapping):
            rest.extend(value.values())
        elif isinstance(value, list) and value and isinstance(value[0], int):
            total += len(value)
        elif isinstance(value, list):
            rest.extend(value)
    return total
