import pytest
import torch

from ch16.parts.inference_profiling import sizes
from ch16.parts.inference_profiling.sizes import prompts, require_memory
from ch16.parts.inference_profiling.tables import ProfiledRun
from ch16.parts.inference_profiling.work import Weights
from common import models
from common.cli import CannotRun
from common.gpu import detect
from common.text import load_model


def test_prompts_are_text_or_random():
    model = models.bundled()
    ids = prompts(model, load_model(model, "cpu")[1], ProfiledRun(3, 12, 10))
    assert ids.shape == (3, 12) and torch.equal(ids[0], ids[2])
    assert prompts(models.dummy("tiny-llama"), None, ProfiledRun(2, 9, 10)).shape == (2, 9)


def test_a_model_larger_than_the_memory(monkeypatch):
    monkeypatch.setattr(sizes, "free_bytes", lambda machine: 1000)
    with pytest.raises(CannotRun, match=r"tiny-llama needs 0\.0 GB for this load, 0\.0 GB are free"):
        require_memory(detect("cpu"), Weights(10_000, 0), models.dummy("tiny-llama"), ProfiledRun(1, 8, 10))
