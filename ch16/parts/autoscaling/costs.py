"""The costs of an engine's steps from the file of an earlier run."""

import json
import math
from pathlib import Path

from common.cli import CannotRun
from common.costs import Costs


def read_costs(path: str) -> tuple[str, Costs, int, float]:
    """From the JSON of an earlier run: the engine, its costs, its slots, and by how much lengths were multiplied.

    Raises:
        CannotRun: no such file, or it holds none.
    """
    try:
        row = json.loads(Path(path).read_text())["tables"]["costs"]["rows"][0]
        parts = [float(row[f"{part}_ms"]) / 1e3 for part in ("base", "sequence", "prompt_token")]
        source, slots, scale = str(row["source"]), int(row["slots"]), float(row["scale"])
    except OSError as error:
        raise CannotRun(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError):
        raise CannotRun(f"{path} holds no costs; write such a file with: autoscaling.py --json FILE") from None
    if not (all(0 <= part < math.inf for part in parts) and parts[0] + parts[1] > 0 and slots > 0 < scale < math.inf):
        raise CannotRun(f"{path} holds costs that no engine has: {parts}, {slots} slots, lengths times {scale}")
    return source, Costs(*parts), slots, scale
