import pytest

from common import text
from common.cli import CannotRun


def test_texts(tmp_path):
    (tmp_path / "a.txt").write_text("Grüße")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\x00")
    assert text.read_text(str(tmp_path / "a.txt"))[0] == "Grüße"
    assert len(text.read_text(None)[0]) > 200_000
    for name in ("missing", "b.bin"):
        with pytest.raises(CannotRun, match="cannot read the text"):
            text.read_text(str(tmp_path / name))
