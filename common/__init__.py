"""What at least two scripts share: timing, GPU detection, process groups, models, vLLM's settings, results."""

import sys

if sys.argv[:1] == ["-m"]:  # `python3 -m common.results`: this package is imported before the module
    from common import environment  # noqa: F401 (importing it does the work)
