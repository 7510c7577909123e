"""`python -m adaconvert`, the same command as the console script."""

from __future__ import annotations

import os
import sys

# `-m` puts the current folder first on the path, the console script does not: without this, a
# folder `kernels` or a file `transformers.py` lying there would be imported by a dependency.
if not sys.flags.safe_path and sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from adaconvert.cli.main import main

main()
