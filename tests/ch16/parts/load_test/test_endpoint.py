from types import SimpleNamespace

from ch16.parts.load_test import endpoint
from common.gpu import detect
from common.loadclient import Endpoint


def test_the_server_finds_the_model_from_another_folder(monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    commands = []

    class Process:
        def __init__(self, command, folder):
            commands.append(command)
            self.url = "http://a:1"

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

    monkeypatch.setattr(endpoint, "ServerProcess", Process)
    monkeypatch.setattr(endpoint, "endpoint_at", lambda url, args: Endpoint(url, "mine", "t"))
    with endpoint.serving(SimpleNamespace(url=None, quick=False, model="./mine"), detect("cpu")) as served:
        assert served.url == "http://a:1"
    (command,) = commands
    assert command[command.index("--model") + 1] == str(tmp_path.resolve() / "mine")
    assert command[command.index("--device") + 1] == "cpu"
