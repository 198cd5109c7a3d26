"""Benchmarks of nsa_cuda: `python -m benchmarks.selected --help`."""
