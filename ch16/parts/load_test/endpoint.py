"""The server under test."""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import requests

from common import models
from common.cli import CannotRun
from common.gpu import Machine
from common.loadclient import Endpoint
from common.server import ServerProcess
from common.standin import MODEL as STANDIN
from common.standin import standin_command


@contextlib.contextmanager
def serving(args: argparse.Namespace, machine: Machine) -> Iterator[Endpoint]:
    """The server at --url, a stand-in with --quick, else inference_serving.py with its defaults."""
    if args.url:
        yield endpoint_at(args.url.rstrip("/"), args)
        return
    if args.quick:
        command = standin_command("--step-ms", "3", "--sequence-us", "300", "--prefill-us", "10", "--slots", "16")
    else:
        script = str(models.ROOT / "ch16" / "inference_serving.py")
        model = models.resolve(args.model, machine).absolute_path
        command = [sys.executable, script, "--serve", "--model", model, "--device", machine.device]
    with tempfile.TemporaryDirectory() as folder, ServerProcess(command, Path(folder)) as process:
        print("the server is ready", flush=True)
        yield endpoint_at(process.url, args)


def endpoint_at(url: str, args: argparse.Namespace) -> Endpoint:
    """What the server at a URL serves, and a tokenizer for it. CannotRun: it is no OpenAI-compatible server."""
    key = os.environ.get("OPENAI_API_KEY")  # as vLLM's client sends it
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        answer = requests.get(f"{url}/v1/models", headers=headers, timeout=10)
        answer.raise_for_status()
        served = answer.json()["data"][0]
        name, root = served["id"], served.get("root") or ""
    except requests.RequestException as error:
        raise CannotRun(f"{url}/v1/models gives no answer: {_reason(error)}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise CannotRun(f"{url}/v1/models does not answer as an OpenAI-compatible server does") from None
    tokenizer = args.tokenizer or (root if Path(root, "config.json").exists() else "")
    if not tokenizer:
        tokenizer = models.bundled().path
        if name != STANDIN:
            print(f"prompts are made with the bundled model's tokenizer; --tokenizer names that of {name}", flush=True)
    return Endpoint(url, name, tokenizer)


def _reason(error: requests.RequestException) -> str:
    if error.response is not None:
        return f"status {error.response.status_code}"
    return "it refused the connection" if "refused" in str(error) else type(error).__name__


def described(model: str) -> str:
    """The served model, for titles."""
    return "a stand-in (simulated)" if model == STANDIN else model
