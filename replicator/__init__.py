"""Replicator: brings machines that run in Azure home to VMware, byte for byte."""

__version__ = "0.1.0"
