"""What keeps a benchmark from being run. Not for a contender that fails: that is a result, and told in the
table.
"""

from __future__ import annotations


class BenchError(Exception):
    """The benchmark cannot be run here; the text says what failed and what would help."""
