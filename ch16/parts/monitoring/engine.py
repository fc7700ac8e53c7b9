"""A vLLM engine for a server with a thread per request."""

import itertools
import queue
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

from common.cli import CannotRun
from common.load import SteppedEngine, exactly

if TYPE_CHECKING:
    from vllm import LLM


class SharedEngine:
    """Steps an engine on a thread of its own: the requests of all threads are batched. A context manager.

    tokens: generated so far.
    """

    def __init__(self, llm: "LLM") -> None:
        self.tokens = 0
        self._engine, self._tokenizer = SteppedEngine(llm), llm.get_tokenizer()
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()  # (prompt, sampling, its Future); None: stop
        self._thread = threading.Thread(target=self._run, daemon=True)

    def generate(self, prompt: str, max_tokens: int) -> dict[str, object]:
        """Complete a prompt by `max_tokens` tokens. Returns the `text` and its number of `tokens`.

        Raises:
            ValueError: the engine refuses the request.
        """
        answer: Future = Future()
        self._inbox.put((prompt, exactly(max_tokens), answer))
        if not self._thread.is_alive():
            raise CannotRun("the engine has ended")
        return answer.result()

    def _run(self) -> None:
        requests: dict[str, tuple[list[int], Future]] = {}  # by name: tokens so far, and where they go
        names = map(str, itertools.count())
        while True:
            while not self._engine.running or not self._inbox.empty():
                arrived = self._inbox.get()
                if arrived is None:
                    return
                prompt, sampling, answer = arrived
                name = next(names)
                try:
                    self._engine.add(name, self._tokenizer.encode(prompt), sampling)
                    requests[name] = [], answer
                except Exception as error:  # of this request alone
                    answer.set_exception(error)
            try:
                outputs = self._engine.step()
            except Exception as error:  # the engine has died
                for _, answer in requests.values():
                    answer.set_exception(error)
                return
            for output in outputs:
                ids, answer = requests[output.request_id]
                ids += output.outputs[0].token_ids
                self.tokens += len(output.outputs[0].token_ids)
                if output.finished:
                    del requests[output.request_id]
                    answer.set_result({"text": self._tokenizer.decode(ids), "tokens": len(ids)})

    def __enter__(self) -> "SharedEngine":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._inbox.put(None)
        self._thread.join()
