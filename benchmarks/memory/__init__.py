"""Loading, residency and the expert cache: what docs/memory.md quotes."""
