"""EXL3 (trellis-quantized) linear layers and mixtures of experts for PyTorch.

`import metal_marlin` registers `torch.ops.metal_marlin`; `import metal_marlin.hf` adds the loader for Hugging Face
transformers.
"""

import torch  # noqa: F401  (first: the C extension looks for PyTorch's C ABI in the running process)

from . import mps_gradients  # noqa: F401  (registers them)
from ._C import cpu_level, cpu_levels
from ._version import __version__
from .dispatch import dispatch_kernel
from .modules import TrellisExperts, TrellisLinear, TrellisMoE, TrellisRouter, TrellisStack
from .ops import dequantize, moe_trellis_swiglu, router, trellis_linear
from .trellis import TrellisTensor
from .weights import Checkpoint

__all__ = [
    "Checkpoint",
    "TrellisExperts",
    "TrellisLinear",
    "TrellisMoE",
    "TrellisRouter",
    "TrellisStack",
    "TrellisTensor",
    "__version__",
    "cpu_level",
    "cpu_levels",
    "dequantize",
    "dispatch_kernel",
    "moe_trellis_swiglu",
    "router",
    "trellis_linear",
]
