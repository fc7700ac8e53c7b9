"""A layout as processes: replicas on devices of their own, the gateway in front of them."""

import contextlib
import json
import math
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import requests
from prometheus_client.parser import text_string_to_metric_families

from ch16.parts.serving_layouts.plan import Layout
from common import models
from common.engine import CPU_KV_CACHE_BYTES
from common.gpu import Machine
from common.models import Model
from common.server import ServerProcess

SERVING, GATEWAY = (models.ROOT / "ch16" / name for name in ("inference_serving.py", "load_balancer.py"))
STREAM_INTERVAL = 8  # tokens an event: one gateway and one client, each on one core, pass on what all GPUs make
GRAPHS_UP_TO = 512  # sequences in a batch, by vLLM's default; a larger batch would run without CUDA graphs


@dataclass(frozen=True)
class Command:
    """A process: its command line without the port, and what is added to the environment."""

    words: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True)
class Service:
    """What every layout serves: the model, and for how many requests at once on the whole host."""

    model: Model | None  # None: stand-ins
    machine: Machine
    devices: Sequence[str]  # as CUDA_VISIBLE_DEVICES names them
    at_once: int
    quantization: str = "auto"
    seed: int = 0


def replica_commands(layout: Layout, service: Service) -> list[Command]:
    """The replicas, on disjoint devices. Each takes its share of the requests, and decodes all of them together."""
    model, share = service.model, math.ceil(service.at_once / layout.replicas)
    words = [str(SERVING), "--serve", "--device", service.machine.device, "--seed", str(service.seed)]
    words += ["--dummy-weights" if model.dummy else "--model", model.absolute_path]
    words += ["--tensor-parallel", str(layout.ranks), "--quantization", service.quantization]
    words += ["--max-num-seqs", str(share), "--max-queue", str(service.at_once)]
    # The client's random prompts count upwards from random tokens: that two have a beginning in common is chance.
    words += ["--no-enable-prefix-caching", "--stream-interval", str(STREAM_INTERVAL)]
    if model.dummy:
        words += ["--tokenizer", words_tokenizer(model), "--no-skip-tokenizer-init"]
    if service.machine.device == "cpu":  # a device is a core
        env = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": str(CPU_KV_CACHE_BYTES // 2**30)}  # as planned
        return [Command(tuple(words), env)] * layout.replicas
    if share > GRAPHS_UP_TO:
        words += ["--max-cudagraph-capture-size", str(share)]
    groups = [service.devices[i * layout.ranks : (i + 1) * layout.ranks] for i in range(layout.replicas)]
    return [Command(tuple(words), {"CUDA_VISIBLE_DEVICES": ",".join(group)}) for group in groups]


def gateway_command(addresses: Sequence[str]) -> Command:
    """The gateway for replicas at these addresses. It waits for a first token as long as a full host may need."""
    return Command((str(GATEWAY), "--servers", ",".join(addresses), "--idle-timeout", "120"), {})


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
    """The gateway and the replicas, all ready; stopped at the end.

    The first replica starts alone: what it compiles the others then find in vLLM's cache, instead of all compiling the
    same at the same time.

    Raises:
        CannotRun: one of them did not start.
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
    """Let this process and its children open as many sockets as the system allows: the gateway needs two a request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard and hard != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def cache_tokens(replicas: Sequence[ServerProcess]) -> int:
    """Tokens that the KV caches of all replicas hold, as vLLM says on /metrics; 0 if it does not."""
    total = 0
    for replica in replicas:
        for family in text_string_to_metric_families(requests.get(f"{replica.url}/metrics", timeout=30).text):
            for sample in family.samples:
                if sample.labels.get("num_gpu_blocks", "").isdigit():  # of vllm:cache_config_info
                    total += int(sample.labels["num_gpu_blocks"]) * int(sample.labels["block_size"])
    return total
