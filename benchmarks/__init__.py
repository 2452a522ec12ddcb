"""Benchmarks: `python -m benchmarks NAME` prints a report, `pytest benchmarks/` runs small cases."""
