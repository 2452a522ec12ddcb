"""Hugging Face transformers: `import metal_marlin.hf`, then from_pretrained of an EXL3 folder works.

Importing registers the quantization method "exl3" and the experts implementation "metal_marlin" (hf_experts.py). Owns
the hooks that transformers' loader calls, and the converters that join the experts of a file into stacks. What goes
where is decided, and every shape, rate and name checked, before any weight is read (hf_plan.py). Weights are never
expanded to a dense copy. Routers that the fused op can stand in for use it (hf_routers.py says which; the others keep
transformers' own routing). Runs on the CPU. Checked with transformers 5.8 to 5.23. Contract:
transformers/quantizers/base.py, core_model_loading.py.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter
    from transformers.integrations.moe import ExpertsInterface
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        f"metal_marlin.hf needs transformers 5.8 or newer ({error}): pip install 'transformers>=5.8'"
    ) from error

from metal_marlin.hf_experts import experts_forward
from metal_marlin.hf_plan import PROJECTIONS, Plan, apply_plan, check_load, make_plan
from metal_marlin.hf_routers import fuse_routers
from metal_marlin.hf_sharding import expert_group, set_plan, shard_experts
from metal_marlin.mps import mps_problem
from metal_marlin.packed import TrellisStack
from metal_marlin.safetensors_header import read_header
from metal_marlin.sharding import ExpertGroup
from metal_marlin.trellis import LEGACY, MARKERS, SCALES, unpack_signs
from metal_marlin.weights import Checkpoint

__all__ = ["EXPERTS_IMPLEMENTATION", "METHOD", "Exl3Config", "Exl3Quantizer", "shard_experts"]

METHOD = "exl3"
EXPERTS_IMPLEMENTATION = "metal_marlin"
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
logger = logging.getLogger("transformers.metal_marlin")


class Exl3Config(QuantizationConfigMixin):
    """`quantization_config` of an EXL3 config.json, for the record: rates and codebooks come from the tensors."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = METHOD
        for name, value in values.items():
            if name != "quant_method":
                setattr(self, name, value)


class StackTrellis(ConversionOps):
    """Joins the trellises of all experts into one flat buffer, with the table that says where each begins."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        stack = _stack(kwargs)
        (tensors,) = input_dict.values()
        input_dict.clear()
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if shapes != stack.shapes:
            raise ValueError(f"{kwargs['full_layer_name']}: got experts of shapes {shapes}; expected {stack.shapes}")
        flat = torch.empty(stack.trellis.shape, dtype=torch.int16, device=tensors[0].device)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for part in reversed(parts):  # from the end: each tensor is freed as soon as it is copied
            part.copy_(tensors.pop().reshape(-1))
        return dict(zip(target_patterns, (flat, stack.make_table(flat.device)), strict=True))


class DropMarkers(ConversionOps):
    """Takes the codebooks' markers of all experts, whose values the pre-flight checked, and gives the table again."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        (tensors,) = input_dict.values()
        return {target_patterns[0]: _stack(kwargs).make_table(tensors[0].device)}


class UnpackSigns(ConversionOps):
    """Legacy sign bits to float16 scales."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        (tensors,) = input_dict.values()
        return {target_patterns[0]: [unpack_signs(tensor) for tensor in tensors]}


class Exl3Quantizer(HfQuantizer):
    """The hooks of transformers' loader, in the order in which it calls them."""

    requires_calibration = False

    def __init__(self, quantization_config: Exl3Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plan = Plan()
        self.group: ExpertGroup | None = None
        self.base = ""
        self.dtypes: dict[str, torch.dtype] = {}
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config: the checkpoint's config.json has none; expected one of method exl3."
                " metal_marlin.hf loads models that exllamav3 has quantized and doesn't quantize while loading"
            )

    def validate_environment(
        self, *args: Any, device_map: Any = None, weights_only: bool = True, **kwargs: Any
    ) -> None:
        """NotImplementedError for a device without kernels; ValueError if pickles were to be trusted."""
        if weights_only is False:
            raise ValueError("weights_only is False; expected True: pickles of EXL3 checkpoints are never read")
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        for place in places:
            problem, is_mps = mps_problem(), str(place).split(":")[0] == "mps"
            if place is not None and str(place) not in ("cpu", "auto") and (problem or not is_mps):
                here = "the CPU only" if problem else "the CPU and on mps only"
                raise NotImplementedError(
                    f"device_map asks for {place}; this version of metal_marlin runs EXL3 models on {here}"
                    + (f": {problem}" if is_mps else "")
                )

    def update_device_map(self, device_map: Any) -> Any:
        """Takes "auto" for the Apple GPU where its kernels run, else for the CPU: it could pick another GPU."""
        if device_map != "auto":
            return device_map
        return {"": "cpu" if mps_problem() else "mps"}

    def update_tp_plan(self, config: Any) -> Any:
        """The same of older versions of transformers."""
        return self.update_attn_implementation(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """Changes nothing. The first hook that knows the folder: refuses pickles before a dtype is sought in them."""
        folder = _folder(config)
        if folder and not any(any(folder.glob(pattern)) for pattern in ("*.safetensors*", "*/*.safetensors*")):
            Checkpoint(folder)
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}; expected one of {', '.join(map(str, DTYPES))}")
        return dtype

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        """The pre-flight; then swaps modules. `model` is on the meta device."""
        if type(model).__module__.split(".")[0] == "transformers_modules":
            raise ValueError(
                f"{type(model).__name__} is code from a checkpoint; expected a model class of transformers"
            )
        self.group = expert_group(model.config)
        with torch.device("cpu"), _checkpoint(model.config, checkpoint_files) as checkpoint:
            self.base = f"{model.base_model_prefix}."
            self.plan = make_plan(model, checkpoint, get_model_conversion_mapping(model))
            foreign = self._share(model, checkpoint)
            with torch.device("meta"):
                apply_plan(model, self.plan)
            fuse_routers(model)
            check_load(model, checkpoint, self.update_weight_conversions(get_model_conversion_mapping(model)), foreign)
        self.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}

    def _share(self, model: Any, checkpoint: Checkpoint) -> set[str]:
        """Gives every rank its part of each layer's experts. Returns the names of the tensors that others load."""
        if self.group is None:
            return set()
        counts = {layer.shape.experts for layer in self.plan.experts.values()}
        if not counts:
            raise ValueError(f"{type(model).__name__} has no quantized experts; expected some to spread over the ranks")
        if len(counts) != 1:
            raise NotImplementedError(
                f"distributed_config: the layers have {sorted(counts)} quantized experts; expected one number"
            )
        self.group.identify(checkpoint)
        foreign: set[str] = set()
        for layer in self.plan.experts.values():
            layer.group = self.group
            foreign |= layer.foreign()
        held = next(iter(self.plan.experts.values())).own
        others = "|".join(str(e) for e in range(counts.pop()) if e not in held)
        ignored = {*(model._keys_to_ignore_on_load_unexpected or ()), rf"\.experts\.(?:{others})\."}
        model._keys_to_ignore_on_load_unexpected = ignored
        if getattr(model.config, "distributed_config", None) is not None:
            set_plan(model, self.plan.experts)
        return foreign

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return False

    def update_weight_conversions(self, weight_conversions: Sequence[Any], model: Any = None) -> list[Any]:
        """Converters for what was swapped, then transformers' own, which still serve experts that are not quantized."""
        own: list[WeightConverter] = []
        for names, held in dict.fromkeys((layer.names, layer.own) for layer in self.plan.experts.values()):
            for name, projection in zip(names, PROJECTIONS, strict=True):
                own += _stack_converters(name, projection, held if self.group else None)
        for path, group in self.plan.linears.items():
            path = path.removeprefix(self.base)  # which the loader puts before it again, or takes off
            for new, old in LEGACY.items():
                if old in group.names:
                    own.append(WeightConverter([rf"{re.escape(path)}\.{old}$"], [f"{path}.{new}"], [UnpackSigns()]))
        return [*own, *weight_conversions]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Casts what is still in the file's half precision: older loaders leave tensors uncast that they rename."""
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dtype in HALVES and tensor.dtype != self.dtypes.get(name, tensor.dtype):
                tensor.data = tensor.data.to(self.dtypes[name])
        if self.group:
            self.group.start()
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        logger.warning(
            "save_pretrained doesn't write EXL3 models: nothing has changed since loading, copy the folder instead"
        )
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained: the ops have gradients with respect to their input, the packed weights have none."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _stack(kwargs: dict[str, Any]) -> TrellisStack:
    """The stack that a converter's target belongs to."""
    stack: TrellisStack = kwargs["model"].get_submodule(kwargs["full_layer_name"].rpartition(".")[0])
    return stack


def _stack_converters(name: str, projection: str, held: range | None = None) -> list[WeightConverter]:
    """From `experts.E.{name}.*` of a file to `experts.{projection}.*`, a TrellisStack; only of experts in `held`."""
    which = r"\d+" if held is None else f"(?:{'|'.join(map(str, held))})"
    source, target = rf"\.experts\.{which}\.{name}\.", f".experts.{projection}."
    converters = [
        WeightConverter([f"{source}trellis$"], [f"{target}trellis", f"{target}table"], [StackTrellis()]),
        WeightConverter([f"{source}(?:{'|'.join(MARKERS)})$"], [f"{target}table"], [DropMarkers()]),
    ]
    for part in (*SCALES, "bias"):
        converters.append(WeightConverter([f"{source}{part}$"], [f"{target}{part}"], [MergeModulelist(0)]))
    for new, old in LEGACY.items():
        converters.append(WeightConverter([f"{source}{old}$"], [f"{target}{new}"], [UnpackSigns(), MergeModulelist(0)]))
    return converters


def _checkpoint(config: Any, files: Sequence[str] | None) -> Checkpoint:
    """The checkpoint that transformers resolved to `files`."""
    if not files:
        raise ValueError("EXL3 weights come from a folder or a hub name; expected one instead of a state_dict")
    return Checkpoint(_folder(config) or Path(files[0]).parent, files)


def _folder(config: Any) -> Path | None:
    """The folder that a model's config came from, None if it came from the hub or from nowhere."""
    name = getattr(config, "_name_or_path", None)
    return Path(name) if name and Path(name).is_dir() else None


def _register() -> None:
    """ImportError if another package has taken the name: whose code loads a model must not be a matter of luck."""
    for mapping in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        taken = mapping.get(METHOD)
        if taken is not None and taken.__module__ != __name__:
            raise ImportError(
                f"transformers' quantization method {METHOD!r} is already registered, by"
                f" {taken.__module__}.{taken.__qualname__}; expected it to be free: import either that package's"
                " integration or metal_marlin.hf in one process"
            )
        mapping.pop(METHOD, None)  # an earlier import of this very module, as by importlib.reload
    auto.register_quantization_config(METHOD)(Exl3Config)
    auto.register_quantizer(METHOD)(Exl3Quantizer)
    ExpertsInterface.register(EXPERTS_IMPLEMENTATION, experts_forward)


def _refuse_unlabelled() -> None:
    """Without a quantization_config, transformers would load an EXL3 folder as random dense weights and only warn.

    No hook sees such a model, so the loading function itself is wrapped. It only ever adds an error.
    """
    load = PreTrainedModel._load_pretrained_model
    if hasattr(load, "refuses_unlabelled_exl3"):
        return
    signature = inspect.signature(load)

    @functools.wraps(load)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        quantizer = getattr(given.get("load_config"), "hf_quantizer", None) or given.get("hf_quantizer")
        for file in (given.get("checkpoint_files") or ()) if quantizer is None else ():
            name = _first_trellis(Path(file))
            if name is not None:
                raise ValueError(
                    f"{file}: holds {name}, but config.json has no quantization_config; expected one with"
                    f" quant_method {METHOD!r}"
                )
        return load(*args, **kwargs)

    checked.refuses_unlabelled_exl3 = True  # type: ignore[attr-defined]
    PreTrainedModel._load_pretrained_model = staticmethod(checked)


def _first_trellis(file: Path) -> str | None:
    """The name of a trellis in a safetensors file. None if it has none, or can't be read: its loader will say so."""
    try:
        return next((name for name in read_header(file) if name.endswith(".trellis")), None)
    except (OSError, ValueError):
        return None


_register()
_refuse_unlabelled()
