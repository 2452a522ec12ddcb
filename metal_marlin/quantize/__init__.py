"""Quantizing: an unquantized Hugging Face folder becomes an EXL3 folder. Needs transformers.

`quantize` and `Options` are the interface; docs/quantize.md says what to choose. matrix.py owns the method,
calibrate.py what layers see of the calibration text, rates.py the budget, source.py and work.py the two folders.
"""

from metal_marlin.quantize.run import Options, quantize

__all__ = ["Options", "quantize"]
