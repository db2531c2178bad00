"""The wire format of Replicator, without any I/O: bytes in, events out; commands in, bytes out.

``SPEC.md`` is normative; this package is one implementation of it.
"""
