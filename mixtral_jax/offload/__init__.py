"""Experts in host memory, the rest on one device: ``--offload experts``."""
