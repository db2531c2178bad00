"""Formats of virtual disks: pure functions between bytes and values."""
