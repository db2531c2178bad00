"""Measurements: what a step costs on this machine. Never run as tests."""
