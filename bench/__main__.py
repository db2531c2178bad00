"""``python -m bench [--json]``: the rates of the single stages on this machine."""

from __future__ import annotations

import json
import os
import platform
import sys

from bench.micro import measure


def main() -> None:
    """Measure and print."""
    rates = []
    as_json = "--json" in sys.argv[1:]
    if not as_json:
        print(f"one core of {os.cpu_count()}, Linux {platform.release()}, Python {platform.python_version()}")
    for rate in measure():
        rates.append({"stage": rate.stage, "bytes_per_s": round(rate.bytes_per_s)})
        if not as_json:
            print(f"{rate.stage:28} {rate.bytes_per_s / 1e6:10,.0f} MB/s")
    if as_json:
        print(json.dumps({"stages": rates}))


if __name__ == "__main__":
    main()
