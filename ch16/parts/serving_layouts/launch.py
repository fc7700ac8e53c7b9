"""The processes of a layout: replicas on their own devices, the gateway in front of them."""

import contextlib
import json
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import requests
from prometheus_client.parser import text_string_to_metric_families

from common import models
from common.gpu import Machine
from common.models import Model
from common.server import ServerProcess
from common.standin import standin_command

SERVING, GATEWAY = (models.ROOT / "ch16" / name for name in ("inference_serving.py", "load_balancer.py"))
FIRST_PORT, GATEWAY_PORT = 8001, 9000  # in the dry run's commands


@dataclass(frozen=True)
class Command:
    """A process: its command line without the port, and what is added to the environment."""

    words: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True)
class Service:
    """What every layout serves: the model, for `at_once` requests on the whole host."""

    model: Model | None  # None: stand-ins
    machine: Machine
    devices: Sequence[str]  # as CUDA_VISIBLE_DEVICES names them
    at_once: int
    quantization: str = "auto"
    seed: int = 0
    fp8: bool = False  # what `quantization` means for this model and machine


def standin_commands(replicas: int) -> list[Command]:
    """Stand-ins for the replicas."""
    words = standin_command("--step-ms", "3", "--sequence-us", "300", "--prefill-us", "10", "--slots", "16")
    return [Command(tuple(words[1:]), {})] * replicas


def gateway_command(addresses: Sequence[str]) -> Command:
    """The gateway for replicas at these addresses. It waits for a first token as long as a full host may need."""
    return Command((str(GATEWAY), "--servers", ",".join(addresses), "--idle-timeout", "120"), {})


def shell(replicas: Sequence[Command]) -> list[str]:
    """The processes of a layout as they would be typed in the repository's folder."""
    ports = range(FIRST_PORT, FIRST_PORT + len(replicas))
    gateway = gateway_command([f"127.0.0.1:{port}" for port in ports])
    lines = []
    for command, port in zip([*replicas, gateway], [*ports, GATEWAY_PORT], strict=True):
        words = [word.replace(f"{models.ROOT}/", "") for word in command.words]
        env = [f"{key}={value}" for key, value in command.env.items()]
        lines.append(" ".join([*env, "python3", *words, "--port", str(port)]))
    return lines


def words_tokenizer(model: Model) -> str:
    """A folder with a tokenizer for random weights: token n is the word `tn`, so that text has exact lengths."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    folder = models.CACHE / "words" / str(model.vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(WordLevel({f"t{n}": n for n in range(model.vocab_size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(folder)


@contextlib.contextmanager
def running(commands: Sequence[Command], folder: Path) -> Iterator[tuple[ServerProcess, list[ServerProcess]]]:
    """The gateway and the replicas, all ready; stopped at the end. CannotRun: one of them did not start.

    On GPUs the first replica starts alone: the others find what it compiled in vLLM's cache.
    """
    allow_many_connections()
    replicas = [ServerProcess([sys.executable, *command.words], folder, command.env) for command in commands]
    with contextlib.ExitStack() as stack:
        for replica in replicas:
            stack.callback(replica.stop)
            replica.start()
            if replica is replicas[0] and "CUDA_VISIBLE_DEVICES" in commands[0].env:
                replica.wait_ready()
        for replica in replicas:
            replica.wait_ready()
        front = gateway_command([replica.address for replica in replicas])
        yield stack.enter_context(ServerProcess([sys.executable, *front.words], folder, front.env)), replicas


def allow_many_connections() -> None:
    """Let this process and its children open as many sockets as allowed: the gateway needs two per request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard and hard != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def cache_tokens(replicas: Sequence[ServerProcess]) -> int:
    """Tokens that the KV caches of all replicas hold, as vLLM reports on /metrics; 0 if it does not."""
    total = 0
    for replica in replicas:
        for family in text_string_to_metric_families(requests.get(f"{replica.url}/metrics", timeout=30).text):
            for sample in family.samples:
                if sample.labels.get("num_gpu_blocks", "").isdigit():  # of vllm:cache_config_info
                    total += int(sample.labels["num_gpu_blocks"]) * int(sample.labels["block_size"])
    return total
