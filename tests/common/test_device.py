import pytest
import torch

from common.device import synchronise


@pytest.mark.parametrize(("name", "waited_for"), [("cpu", []), ("cuda", ["cuda"]), ("cuda:1", ["cuda:1"])])
def test_only_a_gpu_is_waited_for_and_it_is_the_right_one(name, waited_for, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(str(device)))
    synchronise(torch.device(name))
    assert seen == waited_for
