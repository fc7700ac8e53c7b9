"""An engine that decodes by counting, where only the order of things is tested."""

from collections import deque
from types import SimpleNamespace


def counted(tokens_out, temperature=1.0):
    """In place of `common.load.exactly`, which imports vLLM."""
    return SimpleNamespace(max_tokens=tokens_out)


class CountingLLM:
    """Stands in for `vllm.LLM`: a step reads prompts and writes a token each, within a budget, first come first.

    With `ahead` as with asynchronous scheduling: what comes back is of the step before.
    """

    def __init__(self, budget=10**9, ahead=False):
        self.scheduler = SimpleNamespace(max_num_scheduled_tokens=budget)
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=self.scheduler))
        self.llm_engine = self
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_batched_tokens=budget, async_scheduling=ahead),
            cache_config=SimpleNamespace(block_size=16, num_gpu_blocks=1000),
        )
        self.requests = {}  # name: [prompt tokens to read, tokens to write]
        self.priorities = {}
        self.running = []  # requests in each step
        self.under_way = deque([[]] if ahead else [])

    def add_request(self, name, prompt, sampling, priority=0):
        assert name not in self.requests
        self.requests[name] = [len(prompt["prompt_token_ids"]), sampling.max_tokens]
        self.priorities[name] = priority

    def step(self):
        self.running.append(len(self.requests))
        room, outputs = self.scheduler.max_num_scheduled_tokens, []
        for name, left in list(self.requests.items()):
            tokens = min(left[0] or 1, room)
            room -= tokens
            left[0] = max(0, left[0] - tokens)
            if left[0] or not tokens:
                continue
            left[1] -= 1
            done = left[1] == 0
            outputs.append(SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=[0])], finished=done))
            if done:
                del self.requests[name]
        self.under_way.append(outputs)
        return self.under_way.popleft()
