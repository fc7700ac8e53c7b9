import asyncio
import json

import openai
import pytest
import requests
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from common.server import ServerProcess
from common.standin import MAX_TOKENS, PROMPTS, Engine, Running, read_body, standin_command


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standin")
    with ServerProcess(standin_command("--step-ms", "2", "--journal", str(folder / "journal")), folder) as server:
        server.journal = folder / "journal"
        yield server


def test_speaks_the_openai_api_and_says_what_it_is(standin):
    client = openai.OpenAI(base_url=standin.url + "/v1", api_key="-")
    assert client.models.list().data[0].id == "simulated"
    answer = client.completions.create(model="simulated", prompt="a b", max_tokens=4)
    assert answer.choices[0].text == " 1 2 3 4" and answer.usage.completion_tokens == 4
    messages = [{"role": "user", "content": "hi"}]
    stream = client.chat.completions.create(model="simulated", messages=messages, max_tokens=3, stream=True)
    parts = list(stream)
    assert "".join(part.choices[0].delta.content for part in parts) == " 1 2 3"
    assert [part.choices[0].finish_reason for part in parts] == [None, None, "length"]
    assert requests.post(standin.url + "/generate", json={"prompt": "a"}, timeout=5).headers["x-simulated"] == "1"


NO_TOKENS = "max_tokens must be a whole number from 1 to"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}", "not JSON"),
        (b"[]", "no JSON object"),
        (b"5", "no JSON object"),
        (b'{"max_tokens": 5}', "neither messages nor a prompt"),
        (b'{"messages": {"role": "user"}}', "messages must be"),
        (b'{"messages": "hi"}', "messages must be"),
        (b'{"messages": [1]}', "messages must be"),
        (b'{"prompt": {"a": 1}}', "prompt must be"),
        (b'{"prompt": 5}', "prompt must be"),
        (b'{"prompt": [1, null]}', "prompt must be"),
        (b'{"prompt": "a", "max_tokens": 0}', NO_TOKENS),
        (b'{"prompt": "a", "max_tokens": "x"}', NO_TOKENS),
        (b'{"prompt": "a", "max_tokens": true}', NO_TOKENS),
        (b'{"prompt": "a", "max_tokens": 1e400}', NO_TOKENS),
        (b'{"prompt": "a", "max_tokens": NaN}', NO_TOKENS),
        (b'{"prompt": "a", "max_tokens": 100000000000000000000}', NO_TOKENS),
        (b'{"prompt": "a", "max_completion_tokens": [], "max_tokens": 5}', NO_TOKENS),
        (b'{"prompt": "a", "stream": true, "stream_options": "x"}', "stream_options must be"),
        (b'{"prompt": "a", "stream_options": []}', "stream_options must be"),
    ],
)
def test_bad_bodies(standin, body, message):
    answer = requests.post(standin.url + "/v1/completions", data=body, timeout=5)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_a_body_in_an_unknown_charset(standin):
    headers = {"content-type": "application/json; charset=nonsense"}
    answer = requests.post(standin.url + "/generate", data=b'{"prompt": "a"}', headers=headers, timeout=5)
    assert answer.status_code == 200  # JSON is UTF-8 whatever is said of it


def test_bodies():
    def read(**content):
        asked = read_body(json.dumps(content).encode())
        return asked.prompt_tokens, asked.tokens

    assert read(prompt="a" * 40) == (10, 16) and read(prompt="") == (1, 16)
    assert read(prompt=[5, 6, 7], max_tokens=MAX_TOKENS) == (3, MAX_TOKENS)
    assert read(messages=[{"role": "user", "content": "hi"}], max_tokens=5, max_completion_tokens=None)[1] == 5
    assert read(prompt="a", max_tokens=5, max_completion_tokens=6, stream_options=None) == (1, 6)


def test_the_prompts_it_remembers_are_the_last_ones_asked_for():
    async def run():
        engine = Engine(step_s=0.0, sequence_s=0.0, prefill_s=0.0, slots=1)

        def hit(prompt):
            before = engine.hit
            engine.add(Running("", 5, 1), prompt)
            return engine.hit > before

        assert not hit("first") and not hit("second")
        assert not any(hit(f"other {i}") for i in range(PROMPTS - 2))
        assert hit("first")  # and is the last one now
        assert not hit("one more")
        assert hit("first") and not hit("second")
        assert len(engine._seen) == PROMPTS

    asyncio.run(run())


def test_the_journal_says_what_was_worked_on(standin):
    headers = {"x-request-id": "abc"}
    requests.post(standin.url + "/generate", json={"prompt": "a", "max_tokens": 2}, headers=headers, timeout=5)
    lines = [json.loads(line) for line in standin.journal.read_text().splitlines()]
    assert [line["event"] for line in lines if line["id"] == "abc"] == ["started", "finished"]


def metrics(standin):
    """The sum of each series on /metrics."""
    page = requests.get(standin.url + "/metrics", timeout=5).text
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            name = sample.name + sample.labels.get("outcome", "")
            found[name] = found.get(name, 0) + sample.value
    return found


def test_it_counts_as_a_server_does(standin):
    before = metrics(standin)
    for prompt in ("some words to count", "some words to count"):
        body = {"prompt": prompt, "max_tokens": 5}
        assert requests.post(standin.url + "/generate", json=body, timeout=5).status_code == 200
    requests.post(standin.url + "/generate", json={"max_tokens": 0}, timeout=5)
    after = metrics(standin)
    gained = {name: value - before[name] for name, value in after.items() if value != before[name]}
    assert gained["vllm:generation_tokens_total"] == 10 and gained["vllm:inter_token_latency_seconds_count"] == 8
    assert gained["vllm:time_to_first_token_seconds_count"] == gained["vllm:e2e_request_latency_seconds_count"] == 2
    assert gained["vllm:request_time_per_output_token_seconds_count"] == 2
    assert (gained["vllm:prefix_cache_queries_total"], gained["vllm:prefix_cache_hits_total"]) == (8, 3)
    assert (gained["inference_requests_totalok"], gained["inference_requests_totalinvalid"]) == (2, 1)
    assert gained["inference_latency_seconds_count"] == 2 and after["inference_active_requests"] == 0


def test_the_engine_shows_what_its_requests_hold():
    async def run():
        engine = Engine(step_s=0.0, sequence_s=0.0, prefill_s=0.0, slots=1)
        registry = CollectorRegistry()
        registry.register(engine)
        engine.add(Running("", 56, 2))
        engine.add(Running("", 56, 2))
        work = asyncio.create_task(engine.run())
        while not engine.generated:
            await asyncio.sleep(0)
        labels = {"model_name": "simulated", "engine": "0"}
        assert registry.get_sample_value("vllm:num_requests_running", labels) == 1
        assert registry.get_sample_value("vllm:num_requests_waiting", labels) == 1
        assert registry.get_sample_value("vllm:kv_cache_usage_perc", labels) == pytest.approx(57 / 512)
        work.cancel()

    asyncio.run(run())


def test_the_engine_steps_all_together_and_lets_the_rest_wait():
    async def run():
        engine = Engine(step_s=0.0, sequence_s=0.0, prefill_s=0.0, slots=2)
        work = asyncio.create_task(engine.run())
        requests_ = [Running(str(i), 1, tokens) for i, tokens in enumerate((3, 1, 2))]
        for request in requests_:
            engine.add(request)
        first = [await requests_[0].tokens.get(), await requests_[1].tokens.get()]
        assert first == [2, 0] and requests_[2].tokens.empty()  # two slots
        assert [await requests_[2].tokens.get() for _ in range(2)] == [1, 0]
        assert [requests_[0].tokens.get_nowait() for _ in range(2)] == [1, 0]
        engine.add(gone := Running("gone", 1, 5))
        engine.abort(gone)
        await asyncio.sleep(0.01)
        assert gone.tokens.empty() and not engine.running and not engine.waiting
        work.cancel()

    asyncio.run(run())
