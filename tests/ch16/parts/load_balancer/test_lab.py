import pytest

from ch16.parts.load_balancer.lab import REPLICAS, replica_commands
from common import models
from common.gpu import Machine


def machine(device, count=1):
    return Machine(device, "a machine", count, 80 * 2**30, 8, None, True, True)


@pytest.fixture
def folder_model(tmp_path, monkeypatch):
    """A model by a path that is right in this folder only."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return models.resolve("./mine", machine("cpu"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_replicas_find_the_model_from_another_folder(folder_model, tmp_path, device):
    commands = replica_commands(machine(device), folder_model, seed=0)
    for command, _ in commands:
        assert command[command.index("--model") + 1] == str(tmp_path.resolve() / "mine")
    assert len(commands) == REPLICAS


@pytest.mark.parametrize(
    ("listed", "count", "expected"),
    [("4,GPU-abc", 2, ["4", "GPU-abc", "4"]), ("7", 1, ["7", "7", "7"]), (None, 4, ["0", "1", "2"])],
)
def test_replicas_take_the_gpus_that_are_ours(folder_model, monkeypatch, listed, count, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    commands = replica_commands(machine("cuda", count), folder_model, seed=0)
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in commands] == expected
