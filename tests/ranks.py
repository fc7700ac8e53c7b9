"""Start a script on several ranks, as torchrun does."""

import subprocess
import sys

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def torchrun(ranks, script, *args):
    command = [*TORCHRUN, "--nproc-per-node", str(ranks), str(script), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
