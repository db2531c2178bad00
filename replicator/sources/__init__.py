"""Sources: where blocks are read."""
