"""The dispatch investigation: does queueing MoE layers asynchronously pay over what PyTorch does already?

`python -m benchmarks dispatch` runs it; docs/dispatch.md explains it. An experiment is a function
`run(settings, progress) -> Experiment` (result.py) that a module lists in its EXPERIMENTS; plan.py puts them in order.
"""
