"""Hugging Face transformers: `import metal_marlin.hf`, then from_pretrained of an EXL3 folder works.

Importing registers the quantization method "exl3" and the experts implementation "metal_marlin" (hf_experts.py). Owns
the hooks that transformers' loader calls. What goes where is decided, and every shape, rate and name checked, before
any weight is used (hf_plan.py); then the loader is handed packed weights as the modules hold them, views of the mapped
files, and everything else as it lies in the files. Weights are never expanded to a dense copy (memory: hf_memory.py).
Routers that the fused op can stand in for use it (hf_routers.py says which; the others keep transformers' own routing).
Runs on the CPU. Checked with transformers 5.8 to 5.23. Contract: transformers/quantizers/base.py,
core_model_loading.py.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.integrations.moe import ExpertsInterface
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        f"metal_marlin.hf needs transformers 5.8 or newer ({error}): pip install 'transformers>=5.8'"
    ) from error

from metal_marlin.hf_experts import experts_forward
from metal_marlin.hf_memory import check_fit, current, install_cache, loading
from metal_marlin.hf_plan import PROJECTIONS, Plan, apply_plan, check_load, make_plan
from metal_marlin.hf_routers import fuse_routers
from metal_marlin.hf_sharding import expert_group, set_plan, shard_experts
from metal_marlin.mapping import MappedFiles
from metal_marlin.mps import mps_problem
from metal_marlin.mps_mapped import GpuTiles, device_type
from metal_marlin.packed import TrellisStack
from metal_marlin.safetensors_header import TensorInfo, read_header
from metal_marlin.sharding import ExpertGroup
from metal_marlin.trellis import MARKERS
from metal_marlin.weights import Checkpoint

__all__ = ["EXPERTS_IMPLEMENTATION", "METHOD", "Exl3Config", "Exl3Quantizer", "loading", "shard_experts"]

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


class Later:
    """A tensor that is made when the loader takes it, to be sent to another device than the CPU."""

    def __init__(self, make: Callable[[], Tensor], floating: bool) -> None:
        self._make, self._floating = make, floating

    def __getitem__(self, index: Any) -> Tensor:
        return self._make()[index]

    def is_floating_point(self) -> bool:
        return self._floating


class Exl3Quantizer(HfQuantizer):
    """The hooks of transformers' loader, in the order in which it calls them."""

    requires_calibration = False

    def __init__(self, quantization_config: Exl3Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plan = Plan()
        self.group: ExpertGroup | None = None
        self.checkpoint: Checkpoint | None = None
        self.shares, self.cached = True, False
        self.tiles: GpuTiles | None = None
        self.readahead: ReadAhead | None = None
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

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, device_map: Any = None, **kwargs: Any
    ) -> None:
        """The pre-flight; then swaps modules. `model` is on the meta device."""
        if type(model).__module__.split(".")[0] == "transformers_modules":
            raise ValueError(
                f"{type(model).__name__} is code from a checkpoint; expected a model class of transformers"
            )
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        options = current()
        self.group = expert_group(model.config)
        with torch.device("cpu"):
            checkpoint = _checkpoint(model.config, checkpoint_files, options.copy)
            types = {torch.device(place).type for place in places if place is not None}
            gpu = bool(types - {"cpu"} | types & {device_type()})
            self.shares = not gpu and not options.copy
            check_fit(checkpoint, model.config.to_dict(), model.dtype, gpu, self.group.size if self.group else 1)
            self.checkpoint, self.cached = checkpoint, options.cache_bytes is not None
            reads, whole = self.shares and options.populate, self.group is None and not self.cached
            if reads and whole:
                self.readahead = ReadAhead(checkpoint.mapping, [(0, checkpoint.mapping.nbytes)])
            try:
                self.plan = make_plan(model, checkpoint, get_model_conversion_mapping(model))
                foreign = self._share(model, checkpoint)
                if device_type() in types and not options.copy:
                    mixed = f"device_map names several kinds of devices, {', '.join(sorted(types))}"
                    groups = self._tiles(checkpoint)
                    self.tiles = GpuTiles(checkpoint.mapping, groups, device_type(), mixed if len(types) > 1 else None)
                with torch.device("meta"):
                    shared = checkpoint if self.shares or self.tiles is not None else None
                    apply_plan(model, self.plan, shared, self.tiles)
                fuse_routers(model)
                check_load(model, checkpoint, self.plan, get_model_conversion_mapping(model))
            except BaseException:
                if self.readahead is not None:
                    self.readahead.stop()
                raise
            if reads and not whole:
                self.readahead = ReadAhead(checkpoint.mapping, self._wanted(foreign))
        self.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}

    def _share(self, model: Any, checkpoint: Checkpoint) -> set[str]:
        """Gives every rank its part of each layer's experts. Returns the names of the tensors that others load."""
        if self.group is None:
            return set()
        if self.cached:
            raise NotImplementedError(
                "cache_bytes is set and the experts are spread over processes; expected one of them"
            )
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
        if getattr(model.config, "distributed_config", None) is not None:
            set_plan(model, self.plan.experts)
        return foreign

    def _tiles(self, checkpoint: Checkpoint) -> dict[str, list[TensorInfo]]:
        """The trellises of each module that is to hold one tensor of them, by its path."""
        groups = {path: [group] for path, group in self.plan.linears.items()}
        for path, layer in self.plan.experts.items():
            groups |= {f"{path}.{projection}": layer.projection(projection) for projection in PROJECTIONS}
        return {path: [checkpoint.tensors[g.names["trellis"]] for g in found] for path, found in groups.items()}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return False

    def state(self) -> dict[str, Any]:
        """What the loader is to load, in place of the files' tensors: packed weights by their names in the model."""
        checkpoint, state = self.checkpoint, dict[str, Any]()
        assert checkpoint is not None
        placed = [*self.plan.linears.values(), *(g for e in self.plan.experts.values() for g in e.groups.values())]
        packed = {name for group in placed for name in group.names.values()}
        for name in checkpoint.tensors:
            if name not in packed:
                state[name] = checkpoint.tensor(name)
        for path, group in self.plan.linears.items():
            tensor = checkpoint.linear(group.prefix)
            parts = {"trellis": tensor.trellis, "suh": tensor.suh, "svh": tensor.svh, "bias": tensor.bias}
            parts |= {marker: checkpoint.tensor(group.names[marker]) for marker in MARKERS if marker in group.names}
            if self.tiles is not None and path in self.tiles:
                parts["trellis"] = self.tiles.tensor(path).view(tensor.trellis.shape)
            state |= {f"{path}.{part}": value for part, value in parts.items() if value is not None}
        # A few stacks at a time: what goes to a GPU should not pile up here. The loader takes a stack's parts in turn.
        stack_of = functools.lru_cache(4)(functools.partial(_stack, checkpoint, self.shares, self.tiles))
        for path, layer in self.plan.experts.items():
            for projection in PROJECTIONS:
                prefixes = tuple(group.prefix for group in layer.projection(projection))
                name = f"{path}.{projection}"
                in_place = self.tiles is not None and name in self.tiles
                stack = functools.partial(stack_of, prefixes, name if in_place else None)
                for part in ("trellis", "table", "suh", "svh", *(["bias"] if layer.shape.bias else [])):
                    make = functools.partial(_buffer, stack, part)
                    state[f"{name}.{part}"] = make() if self.shares else Later(make, part[0] in "sb")
        return state

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Casts what is still in the file's half precision: older loaders leave tensors uncast that they rename."""
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dtype in HALVES and tensor.dtype != self.dtypes.get(name, tensor.dtype):
                tensor.data = tensor.data.to(self.dtypes[name])
        if self.tiles is not None:
            model.metal_marlin_placement = placement = self.tiles.placement
            logger.log(logging.WARNING if placement.copied else logging.INFO, "on %s, %s", model.device, placement)
        if self.checkpoint is not None and (self.shares or (self.tiles is not None and self.tiles.placement.mapped)):
            mapping = self.checkpoint.mapping
            if self.cached:
                model.metal_marlin_cache = install_cache(model, self.plan, self.checkpoint)
            if self.readahead is not None:
                self.readahead.wait()
            for module in {id(part): part for part in (model, model.base_model)}.values():
                module.register_forward_pre_hook(FileCheck(mapping))
                module.register_forward_hook(FileCheck(mapping))
                module.metal_marlin_files = FileCheck(mapping)
        if self.checkpoint is not None:
            self.checkpoint.check()  # what was copied or cast has been read by now
        self.checkpoint = self.readahead = self.tiles = None
        if self.group:
            self.group.start()
        return model

    def _wanted(self, foreign: set[str]) -> list[tuple[int, int]]:
        """Where in the mapping lies what stays in memory here, in bytes from its beginning: not what others load, and
        no experts that go to a cache."""
        checkpoint = self.checkpoint
        assert checkpoint is not None
        experts = [group for layer in self.plan.experts.values() for group in layer.groups.values()]
        left = foreign | ({group.names["trellis"] for group in experts} if self.cached else set())
        infos = [info for name, info in checkpoint.tensors.items() if name not in left and info.nbytes]
        return [(checkpoint.mapping.place(info), checkpoint.mapping.place(info) + info.nbytes) for info in infos]

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


class FileCheck:
    """A hook before and after a forward pass: OSError instead of wrong results if a mapped file has changed.

    The ops check what they read themselves, also where hooks are compiled away; this is for embeddings, norms and heads
    that aren't quantized, which torch reads, and says so before anything is computed.
    """

    def __init__(self, mapping: MappedFiles | None) -> None:
        self.mapping = mapping

    def __call__(self, module: Any, arguments: Any, output: Any = None) -> None:
        if self.mapping is not None and not torch.compiler.is_compiling():
            self.mapping.check()

    def __deepcopy__(self, memo: dict[int, Any]) -> FileCheck:
        """Of a model's copy, which owns its weights. Hooks are copied before the weights are read for it, attributes
        afterwards: a model has both."""
        if self.mapping is not None:
            self.mapping.check()
        return FileCheck(None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Of a pickled model, which owns its weights too."""
        if self.mapping is not None:
            self.mapping.check()
        return FileCheck, (None,)


class ReadAhead:
    """A thread that reads ranges of a mapping into memory, while checks and the loader go through names.

    Errors are left to whoever needs the bytes: the loader, or the check after it.
    """

    STEP = 256 << 20

    def __init__(self, mapping: MappedFiles, ranges: Sequence[tuple[int, int]]) -> None:
        self._mapping, self._ranges, self._stopped = mapping, ranges, threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more than a step is read from now on."""
        self._stopped.set()

    def wait(self) -> None:
        """Until all is read."""
        self._thread.join()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            for begin, end in self._ranges:
                for at in range(begin, end, self.STEP):
                    if self._stopped.is_set():
                        return
                    self._mapping.populate(at, min(at + self.STEP, end))


def _stack(
    checkpoint: Checkpoint, shares: bool, tiles: GpuTiles | None, prefixes: tuple[str, ...], placed: str | None
) -> TrellisStack:
    """The stack of the matrices with these names; back to back if it isn't to stay where it is.

    placed  its name in `tiles`, if that is where its tiles are; the rest is on the CPU
    """
    experts = [checkpoint.linear(prefix) for prefix in prefixes]
    if tiles is not None and placed is not None:
        stack = TrellisStack.from_experts(experts)
        stack.trellis = tiles.tensor(placed)
        return stack
    return TrellisStack.from_experts(experts if shares else [replace(expert, place=None) for expert in experts])


def _buffer(stack: Callable[[], TrellisStack], part: str) -> Tensor:
    buffer: Tensor = stack().get_buffer(part)
    return buffer


def _checkpoint(config: Any, files: Sequence[str] | None, copy: bool) -> Checkpoint:
    """The checkpoint that transformers resolved to `files`."""
    if not files:
        raise ValueError("EXL3 weights come from a folder or a hub name; expected one instead of a state_dict")
    return Checkpoint(_folder(config) or Path(files[0]).parent, files, copy=copy)


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


def _wrap_loading() -> None:
    """The loading function itself is wrapped, for two things that no hook reaches.

    What it loads: packed weights as the modules hold them, which converters could only make copies for. And without a
    quantization_config, it would load an EXL3 folder as random dense weights and only warn: an error instead.
    """
    load = PreTrainedModel._load_pretrained_model
    load = getattr(load, "metal_marlin_wraps", load)  # an earlier import of this very module
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
        if isinstance(quantizer, Exl3Quantizer) and quantizer.checkpoint is not None:
            call = signature.bind(*args, **kwargs)
            call.arguments["state_dict"] = quantizer.state()
            return load(*call.args, **call.kwargs)
        return load(*args, **kwargs)

    checked.metal_marlin_wraps = load  # type: ignore[attr-defined]
    PreTrainedModel._load_pretrained_model = staticmethod(checked)


def _first_trellis(file: Path) -> str | None:
    """The name of a trellis in a safetensors file. None if it has none, or can't be read: its loader will say so."""
    try:
        return next((name for name in read_header(file) if name.endswith(".trellis")), None)
    except (OSError, ValueError):
        return None


_register()
_wrap_loading()
