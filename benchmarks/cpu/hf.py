"""transformers' experts as a contender: the class that a loaded model has, by its eager loop and by grouped_mm."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cpu.contender import Absent, Contender, Options, Variant, Work, copies_for
from benchmarks.cpu.dense import DTYPES, DenseWork, dense_variants, filled
from benchmarks.cpu.shapes import Array, Shape

FORMS = ("grouped_mm", "eager")


class Transformers(Contender):
    """Modules of dense weights. Both forms of a dtype share them: a form is a setting of the module's config."""

    def __init__(self, options: Options) -> None:
        try:
            import transformers
            from transformers.models.mixtral import modeling_mixtral
        except ImportError as error:
            raise Absent(str(error)) from None
        if not hasattr(modeling_mixtral, "MixtralExperts"):
            raise Absent(f"transformers {transformers.__version__} has no MixtralExperts; 5.8 or newer has")
        self.version, self.source = transformers.__version__, modeling_mixtral
        self.layers: dict[torch.dtype, list[torch.nn.Module]] = {}
        torch.set_num_threads(options.threads)

    def facts(self) -> dict[str, str]:
        return {"version": self.version, "torch": torch.__version__}

    def variants(self, op: str) -> list[Variant]:
        return [v for form in FORMS for v in dense_variants(f"{form} ")] if op == "moe" else []

    def bytes_needed(self, shape: Shape, variant: str, cold_bytes: int) -> int:
        layer = shape.weights * DTYPES[variant.split()[1]].itemsize
        return layer * copies_for(layer, cold_bytes)

    def needs(self, shape: Shape, variants: list[str], cold_bytes: int) -> dict[str, int]:
        first = {variant.split()[1]: variant for variant in reversed(variants)}  # of each dtype: the other form uses it
        own = super().needs(shape, variants, cold_bytes)
        return {name: size if name in first.values() else 0 for name, size in own.items()}

    def build(self, shape: Shape, variant: str, cold_bytes: int, weights: tuple[Array, ...] | None) -> Work:
        form, name = variant.split()
        dtype = DTYPES[name]
        if dtype not in self.layers:
            count = 1 if weights is not None else copies_for(shape.weights * dtype.itemsize, cold_bytes)
            self.layers[dtype] = [self.module(shape, dtype, weights) for _ in range(count)]
        return Experts(shape, dtype, form, self.layers[dtype])

    def module(self, shape: Shape, dtype: torch.dtype, weights: tuple[Array, ...] | None) -> torch.nn.Module:
        """MixtralExperts of these sizes; Qwen3-MoE's class is the same code under another name."""
        e, h, i = shape.experts, shape.hidden, shape.inner
        config = self.source.MixtralConfig(
            hidden_size=h, intermediate_size=i, num_local_experts=e, num_experts_per_tok=shape.top_k, hidden_act="silu"
        )
        with torch.device("meta"):
            module: torch.nn.Module = self.source.MixtralExperts(config)
        if weights is None:
            both = filled(e, 2 * i, h, dtype, None)
        else:
            both = torch.cat([filled(e, i, h, dtype, w) for w in weights[:2]], 1)
        down = filled(e, h, i, dtype, None if weights is None else weights[2])
        module.gate_up_proj = torch.nn.Parameter(both, requires_grad=False)
        module.down_proj = torch.nn.Parameter(down, requires_grad=False)
        return module.eval()

    def drop(self) -> None:
        self.layers.clear()


class Experts(DenseWork):
    """One form on modules that exist already."""

    def __init__(self, shape: Shape, dtype: torch.dtype, form: str, modules: list[torch.nn.Module]) -> None:
        self.shape, self.dtype, self.form, self.modules = shape, dtype, form, modules
        self.matrix_bytes = float(shape.matrix_weights * dtype.itemsize)
        self.copies, self.at = len(modules), -1

    def run(self) -> None:
        module: Any = self.modules[self.at]
        module.config._experts_implementation = self.form
        self.y = module(self.x, self.ids, self.weights)
