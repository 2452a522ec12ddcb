"""`python -m benchmarks cpu`: our ops against the other libraries installed, in one interleaved run. docs/cpu.md."""
