"""``python -m bench``: the same as ``replicator bench``."""

from __future__ import annotations

import sys

from agents.cli.main import main

sys.argv.insert(1, "bench")
main()
