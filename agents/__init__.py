"""Composition roots: here the parts of ``replicator`` are put together into daemons and commands."""
