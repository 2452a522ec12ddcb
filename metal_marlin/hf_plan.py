"""The pre-flight of loading an EXL3 checkpoint into a transformers model: all is checked before any weight is read.

Owns which linear layers and experts of a model (still on the meta device) the checkpoint quantizes, their rates, and
the two checks: that every quantized matrix fits its place, and that the loader will then find every tensor it needs
and need every tensor it finds. hf.py swaps the modules and runs the load. Names are mapped by transformers' own
renaming rules, so the plan sees what the loader sees.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from metal_marlin.hf_activation import Activation, find_activation
from metal_marlin.modules import TrellisExperts, TrellisLinear, TrellisStack
from metal_marlin.packed import layout_of
from metal_marlin.sharding import ExpertGroup, ShardedExperts, expert_range
from metal_marlin.trellis import LEGACY, SCALES, pad128
from metal_marlin.weights import Checkpoint, TrellisGroup, raise_problems

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
EXPERT_NAMES = (PROJECTIONS, ("w1", "w3", "w2"))  # how files call gate, up and down
EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(\w+)")
HARMLESS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")  # derived values that old files still hold


@dataclass(frozen=True)
class ExpertsShape:
    """What a transformers experts module says of itself."""

    experts: int
    hidden: int
    intermediate: int
    bias: bool
    activation: Activation


@dataclass
class ExpertsPlan:
    """Quantized experts of a layer: the file's `names` of gate, up and down, the matrices by (expert, name)."""

    shape: ExpertsShape
    names: tuple[str, str, str] = PROJECTIONS
    groups: dict[tuple[int, str], TrellisGroup] = field(default_factory=dict)
    group: ExpertGroup | None = None

    @property
    def own(self) -> range:
        """The experts that this process loads."""
        everyone = self.shape.experts
        return expert_range(everyone, self.group.size, self.group.rank) if self.group else range(everyone)

    def projection(self, projection: str) -> list[TrellisGroup]:
        """The matrices of one of PROJECTIONS, by expert, of those that this process loads."""
        name = self.names[PROJECTIONS.index(projection)]
        return [self.groups[e, name] for e in self.own]

    def foreign(self) -> set[str]:
        """Names of the tensors that other processes load."""
        own = self.own
        return {name for (e, _), group in self.groups.items() if e not in own for name in group.names.values()}


@dataclass
class Plan:
    """What to swap: {path of a module in the model: what takes its place}."""

    linears: dict[str, TrellisGroup] = field(default_factory=dict)
    experts: dict[str, ExpertsPlan] = field(default_factory=dict)


def make_plan(model: Any, checkpoint: Checkpoint, conversions: Sequence[Any]) -> Plan:
    """Finds the place of every quantized matrix. `conversions` is transformers' mapping for the model.

    ValueError lists matrices without a place, of a wrong size, or missing next to others.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    plan, problems = Plan(), list[str]()
    if not checkpoint.groups:
        problems.append("config.json says exl3, but no tensor is named *.trellis; expected quantized matrices")
    renamed = _renamer(model, conversions, {})
    unused = _ignored(model)
    for prefix in sorted(checkpoint.groups, key=dot_natural_key):
        group = checkpoint.groups[prefix]
        path = renamed(f"{prefix}.trellis")[0].removesuffix(".trellis")
        if ".slice." in path:
            problems.append(
                f"{prefix}: is a slice of a layer wider than 55296; expected whole layers (slices aren't supported)"
            )
            continue
        for candidate in _with_and_without_prefix(model, path):
            expert = EXPERT.fullmatch(candidate)
            if isinstance(modules.get(candidate), nn.Linear):
                plan.linears[candidate] = group
                break
            if expert and _is_stack(modules.get(expert[1])):
                _place_expert(modules[expert[1]], expert, group, plan, problems)
                break
        else:
            if not unused(f"{path}.trellis"):
                problems.append(f"{prefix}.trellis: is extra; {type(model).__name__} has no layer {path}")
    for path, group in plan.linears.items():
        layer: Any = modules[path]
        problems += _size_problems(group, layer.in_features, layer.out_features, layer.bias is not None)
    for experts in plan.experts.values():
        problems += _experts_problems(experts)
    raise_problems(checkpoint.directory, problems)
    return plan


def apply_plan(model: Any, plan: Plan, shared: Checkpoint | None = None, placed: Container[str] | None = None) -> None:
    """Swaps the modules, on the device that the caller's context sets, and unties a quantized head.

    shared  the checkpoint whose memory the stacks of experts are to share, None for stacks of their own
    placed  if not all of them are to share it: PATH.PROJECTION of those that are
    """
    for path, group in plan.linears.items():
        old = model.get_submodule(path)
        sizes = old.in_features, old.out_features
        bias = old.bias is not None
        model.set_submodule(path, TrellisLinear(*sizes, bits=group.bits, codebook=group.codebook, bias=bias))
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
        if tied.pop(f"{path}.weight", None) is not None:
            for config in (model.config, model.config.get_text_config()):
                config.tie_word_embeddings = False
    for path, layer in plan.experts.items():
        shape, act = layer.shape, layer.shape.activation
        gate, up, down = (
            _empty_stack(
                layer.projection(projection),
                shape.bias,
                shared if placed is None or f"{path}.{projection}" in placed else None,
            )
            for projection in PROJECTIONS
        )
        sizes, options = (shape.hidden, shape.intermediate), asdict(act)
        if layer.group is None:
            new = TrellisExperts(gate, up, down, *sizes, **options)
        else:
            options |= {"total_experts": shape.experts, "group": layer.group}
            new = ShardedExperts(gate, up, down, *sizes, **options)
        act_fn = getattr(model.get_submodule(path), "act_fn", None)
        if isinstance(act_fn, nn.Module):
            new.add_module("act_fn", act_fn)  # part of the contract of experts modules, though not used by ours
        model.set_submodule(path, new)


def check_load(model: Any, checkpoint: Checkpoint, plan: Plan, conversions: Sequence[Any]) -> None:
    """Goes through the loader's motions with names and shapes only, after `apply_plan`.

    ValueError lists tensors that are missing, extra or of a wrong shape. What the plan has a place for is whole: making
    the plan has checked it.
    """
    expected: dict[str, Any] = model.state_dict()
    targets = {p: c.target_patterns for c in conversions if isinstance(c, WeightConverter) for p in c.source_patterns}
    renamed, plain = _renamer(model, conversions, expected), _renamer(model, [], expected)
    unused = _ignored(model)
    packed = {name for group in checkpoint.groups.values() for name in group.names.values()}
    swapped = tuple(f"{path}." for path in (*plan.linears, *plan.experts))
    found = {key for key in expected if key.startswith(swapped)} if swapped else set[str]()
    problems: list[str] = []
    for name in sorted(checkpoint.tensors.keys() - packed, key=dot_natural_key):
        key, pattern = renamed(name)
        if key not in expected and name in expected:
            key, pattern = plain(name)
        if key not in expected:
            if not unused(key):
                problems.append(f"{name}: is extra; {type(model).__name__} has no {key}")
            continue
        if pattern is not None:
            first, *others = targets[pattern]
            found.update(key.replace(first, other) for other in others)
        elif tuple(expected[key].shape) != checkpoint.tensors[name].shape:
            shape = list(checkpoint.tensors[name].shape)
            problems.append(f"{name}: has shape {shape}; expected {list(expected[key].shape)}")
        found.add(key)
    for one, other in getattr(model, "all_tied_weights_keys", {}).items():
        if one in found or other in found:
            found |= {one, other}
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = [key for key in expected if key not in found and not any(p.search(key) for p in optional)]
    problems += [f"{key}: is missing; {type(model).__name__} needs it" for key in missing]
    raise_problems(checkpoint.directory, problems)


def _place_expert(
    module: nn.Module, match: re.Match[str], group: TrellisGroup, plan: Plan, problems: list[str]
) -> None:
    path, index, name = match[1], int(match[2]), match[3]
    if path not in plan.experts:
        try:
            plan.experts[path] = ExpertsPlan(_experts_shape(module))
        except ValueError as error:
            problems.append(f"{path}: {error}")
            plan.experts[path] = ExpertsPlan(ExpertsShape(0, 0, 0, False, Activation("silu")))
    layer = plan.experts[path]
    known = [names for names in EXPERT_NAMES if name in names]
    if not known:
        expected = " or ".join(", ".join(names) for names in EXPERT_NAMES)
        problems.append(f"{group.prefix}: expected a projection named {expected}")
        return
    layer.names = known[0]
    layer.groups[index, name] = group


def _empty_stack(groups: list[TrellisGroup], bias: bool, shared: Checkpoint | None) -> TrellisStack:
    rates2, codebooks = [group.rate2 for group in groups], [group.codebook for group in groups]
    layout = None
    if shared is not None:
        infos = [shared.tensors[group.names["trellis"]] for group in groups]
        layout = layout_of([shared.mapping.place(info) for info in infos], [info.nbytes // 2 for info in infos])
    return TrellisStack(groups[0].k, groups[0].n, rates2, codebooks, bias=bias, layout=layout)


def _is_stack(module: nn.Module | None) -> bool:
    """Whether a module holds all experts' down projections in one parameter."""
    weight = getattr(module, "down_proj", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 3


def _experts_shape(module: Any) -> ExpertsShape:
    """ValueError if the module computes something that the experts' op doesn't."""
    kind = type(module).__name__
    gate_up, down = getattr(module, "gate_up_proj", None), module.down_proj
    parameters = [p for p in inspect.signature(type(module).forward).parameters.values() if p.kind != p.VAR_KEYWORD]
    if not isinstance(gate_up, nn.Parameter) or not getattr(module, "has_gate", True):
        raise ValueError(f"{kind} has no gate_up_proj; experts without a gate aren't supported")
    if len(parameters) != 4:
        raise ValueError(
            f"{kind}.forward takes {len(parameters) - 1} arguments; expected hidden states, ids and weights"
        )
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(f"{kind} normalizes every expert's output, which isn't supported")
    experts, *sizes = down.shape
    hidden, intermediate = reversed(sizes) if getattr(module, "is_transposed", False) else sizes
    if sorted(gate_up.shape) != sorted((experts, hidden, 2 * intermediate)):
        raise ValueError(f"{kind}.gate_up_proj has shape {list(gate_up.shape)}; expected sizes of {list(down.shape)}")
    bias = getattr(module, "gate_up_proj_bias", None) is not None
    return ExpertsShape(experts, hidden, intermediate, bias, find_activation(module))


def _experts_problems(layer: ExpertsPlan) -> list[str]:
    """Experts that are missing, too many, of a wrong size, or stored in two ways."""
    shape, problems = layer.shape, list[str]()
    if not shape.experts or not layer.groups:
        return problems  # already reported
    root = next(iter(layer.groups.values())).prefix.rsplit(".", 2)[0]
    for name in layer.names:
        for e in range(shape.experts):
            if (e, name) not in layer.groups:
                problems.append(f"{root}.{e}.{name}.trellis: is missing; other matrices of these experts are quantized")
    down = layer.names[2]
    for (e, name), group in layer.groups.items():
        if e >= shape.experts or name not in layer.names:
            problems.append(
                f"{group.prefix}.trellis: is extra; the layer has {shape.experts} experts of {', '.join(layer.names)}"
            )
            continue
        sizes = (shape.intermediate, shape.hidden) if name == down else (shape.hidden, shape.intermediate)
        problems += _size_problems(group, *sizes, shape.bias)
    for name in layer.names:
        scales = [{*SCALES, *LEGACY.values()} & g.names.keys() for (_, own), g in layer.groups.items() if own == name]
        if any(names != scales[0] for names in scales):
            problems.append(
                f"{root}.*.{name}: some experts have su and sv, others suh and svh; expected one of the two"
            )
    return problems


def _size_problems(group: TrellisGroup, in_features: int, out_features: int, bias: bool) -> list[str]:
    problems = []
    want = pad128(in_features), pad128(out_features)
    if (group.k, group.n) != want:
        problems.append(
            f"{group.names['trellis']}: is a matrix of {group.k} inputs and {group.n} outputs; expected"
            f" {want[0]} and {want[1]}, which is {in_features} and {out_features} rounded up to 128"
        )
    if bias != group.has_bias:
        problems.append(
            f"{group.prefix}.bias: is {'missing' if bias else 'extra'}; the layer has {'a' if bias else 'no'} bias"
        )
    return problems


def _with_and_without_prefix(model: Any, path: str) -> Iterable[str]:
    """A path as it is, and with the base model's prefix taken off or put on, as the loader tries."""
    base = f"{model.base_model_prefix}."
    return path, path.removeprefix(base), base + path


def _renamer(
    model: Any, conversions: Sequence[Any], expected: dict[str, Any]
) -> Callable[[str], tuple[str, str | None]]:
    """name -> (the loader's name for it, the pattern of the converter it goes through)."""
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]

    def renamed(name: str) -> tuple[str, str | None]:
        prefix = model.base_model_prefix  # by position: this argument's name has changed
        result: tuple[str, str | None] = rename_source_key(name, renamings, converters, prefix, expected)
        return result

    return renamed


def _ignored(model: Any) -> Callable[[str], bool]:
    """Whether transformers itself doesn't mind a tensor that the model has no place for."""
    patterns = [re.compile(p) for p in (*(model._keys_to_ignore_on_load_unexpected or ()), *HARMLESS)]
    headless = model.base_model is model
    base = f"{model.base_model_prefix}."

    def ignored(key: str) -> bool:
        return any(p.search(key) for p in patterns) or (headless and not key.startswith(base))

    return ignored
