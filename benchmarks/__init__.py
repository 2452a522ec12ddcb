"""Benchmarks: `python -m benchmarks cpu` prints a table, `pytest benchmarks/` runs its cases too."""
