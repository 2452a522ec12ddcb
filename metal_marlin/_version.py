"""The package's version, said once: setup, the C extension's build and `metal_marlin.__version__` read it here."""

__version__ = "0.1.0"
