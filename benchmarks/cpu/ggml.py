"""ggml as a contender: ik_llama.cpp's fork with its trellis types, and the mainline library.

A layer is the graph that each project builds for it: ik_llama.cpp's fused gate and up and its fused weighted sum;
mainline's swiglu, product and additions. One graph for each copy of the weights, made when a token count first comes.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from benchmarks.cpu.contender import Absent, Contender, Options, Variant, Work, copies_for, limit_of
from benchmarks.cpu.ggml_library import F32, I32, SILU, Library
from benchmarks.cpu.shapes import Array, Inputs, Shape, normal

IK = ("IQ2_KT", "IQ3_KT", "IQ4_KT", "IQ2_KS", "IQ4_KS", "Q2_K", "Q3_K", "Q4_K", "Q2_K_R4", "Q3_K_R4", "Q4_K_R4")
MAINLINE = ("Q2_K", "Q3_K", "Q4_K")
REPACK, REPACKED = " repacked", ("Q2_K", "Q4_K")  # on some processors, which the library is asked about
ROWS = 64  # rows that are quantized; a layer repeats them, since quantizing one would take minutes


class Ggml(Contender):
    """One of the two libraries."""

    ik = False

    def __init__(self, options: Options) -> None:
        self.library = Library(self.ik, options.library)
        self.backend = self.library.backend_cpu_init()
        self.library.backend_cpu_set_n_threads(self.backend, options.threads)
        self.repacked: Any = None
        if not self.ik:
            with contextlib.suppress(Absent):
                self.repacked = self.library.repacking()

    def facts(self) -> dict[str, str]:
        return {"library": " ".join(path.name for path in self.library.paths)}

    def variants(self, op: str) -> list[Variant]:
        if op == "router":
            return []
        names = [name for name in (IK if self.ik else MAINLINE) if name in self.library.types]
        if self.repacked:
            names += [f"{name}{REPACK}" for name in REPACKED if name in names]
        return [Variant(n, self.bits(n, 4096), limit_of(self.bits(n, 4096)), family_of(n)) for n in names]

    def bits(self, name: str, columns: int) -> float:
        """Bits per weight of a row of that length."""
        return float(self.library.row_size(self.number(name), columns)) * 8 / columns

    def number(self, name: str) -> int:
        """The number of the variant's type."""
        return self.library.types[name.removesuffix(REPACK)]

    def layer_bytes(self, shape: Shape, name: str) -> float:
        """Of all its matrices."""
        return sum(shape.experts * n * float(self.library.row_size(self.number(name), k)) for k, n in matrices(shape))

    def bytes_needed(self, shape: Shape, variant: str, cold_bytes: int) -> int:
        layer = self.layer_bytes(shape, variant)
        return int(layer * copies_for(layer, cold_bytes))

    def build(self, shape: Shape, variant: str, cold_bytes: int, weights: tuple[Array, ...] | None) -> Work:
        copies = 1 if weights is not None else copies_for(self.layer_bytes(shape, variant), cold_bytes)
        return Layers(self, shape, variant, copies, weights)


class IkLlama(Ggml):
    """ik_llama.cpp."""

    ik = True


def family_of(name: str) -> str:
    """ "trellis" of the KT types."""
    return "trellis" if name.endswith("_KT") else "scalar"


def matrices(shape: Shape) -> list[tuple[int, int]]:
    """(columns, rows) of the layer's matrices, as ggml counts: columns are inputs."""
    h, i = shape.hidden, shape.inner
    return [(h, i), (h, i), (i, h)] if shape.op == "moe" else [(h, i)]


class Graph:
    """One copy's graph for one token count: where its inputs go and its result is."""

    def __init__(self, made: Any, x: Any, ids: Any, weights: Any, out: Any) -> None:
        self.made, self.x, self.ids, self.weights, self.out = made, x, ids, weights, out


class Layers(Work):
    """Copies of one layer."""

    def __init__(self, owner: Ggml, shape: Shape, variant: str, copies: int, weights: tuple[Array, ...] | None) -> None:
        self.owner, self.shape, self.copies, self.at = owner, shape, copies, -1
        ggml, kind = owner.library, owner.number(variant)
        self.matrix_bytes = owner.layer_bytes(shape, variant) / shape.experts
        self.ggml = ggml
        self.holder = ggml.context()
        self.tensors = [
            [ggml.new_tensor_3d(self.holder, kind, k, n, shape.experts) for k, n in matrices(shape)]
            for _ in range(copies)
        ]
        where = owner.repacked if variant.endswith(REPACK) else ggml.backend_cpu_buffer_type()
        self.buffer = ggml.backend_alloc_ctx_tensors_from_buft(self.holder, where)
        if not self.buffer:
            raise MemoryError(f"ggml could not allocate {copies} layers")
        for which, (columns, rows) in enumerate(matrices(shape)):
            if variant.endswith(REPACK) and not ggml.multiplies(self.tensors[0][which], shape.op == "moe", columns):
                ggml.backend_buffer_free(self.buffer)
                ggml.free(self.holder)
                raise ValueError("ggml does not repack this type for this processor and shape")
            data = self.data(variant.removesuffix(REPACK), columns, rows, weights[which] if weights else None)
            for tensors in self.tensors:
                if data.nbytes != ggml.nbytes(tensors[which]):
                    raise ValueError(f"{data.nbytes} bytes for a tensor of {ggml.nbytes(tensors[which])}")
                ggml.backend_tensor_set(tensors[which], data.ctypes.data, 0, data.nbytes)
        self.tokens = 0
        self.allocator: Any = None
        self.context: Any = None
        self.graphs: list[Graph] = []

    def data(self, kind: str, columns: int, rows: int, weights: Array | None) -> Array:
        """One projection of all experts, quantized."""
        total = rows * self.shape.experts
        if weights is not None:
            return self.ggml_quantize(kind, weights.reshape(total, columns))
        some = self.ggml_quantize(kind, normal((columns,), ROWS, columns))
        return np.tile(some, total // ROWS)

    def ggml_quantize(self, kind: str, weights: Array) -> Array:
        quantized: Array = self.ggml.quantize(kind, weights)
        return quantized

    def prepare(self, tokens: int) -> None:
        """Graphs for this token count."""
        self.forget()
        ggml = self.ggml
        self.allocator = ggml.gallocr_new(ggml.backend_cpu_buffer_type())
        self.tokens = tokens
        self.context = ggml.context(self.copies << 20)  # of which most is never touched
        for tensors in self.tensors:
            graph = (self.moe if self.shape.op == "moe" else self.linear)(self.context, tensors, tokens)
            ggml.set_output(graph.out)
            ggml.build_forward_expand(graph.made, graph.out)
            if not ggml.gallocr_alloc_graph(self.allocator, graph.made):
                raise MemoryError(f"ggml could not allocate a graph for {tokens} tokens")
            self.graphs.append(graph)
        self.y = np.zeros((tokens, self.shape.inner if self.shape.op == "linear" else self.shape.hidden), np.float32)

    def linear(self, context: Any, tensors: list[Any], tokens: int) -> Graph:
        ggml = self.ggml
        x = ggml.new_tensor_2d(context, F32, self.shape.hidden, tokens)
        ggml.set_input(x)
        return Graph(ggml.new_graph(context), x, None, None, ggml.mul_mat(context, tensors[0], x))

    def moe(self, context: Any, tensors: list[Any], tokens: int) -> Graph:
        ggml, (gate, up, down) = self.ggml, tensors
        h, top = self.shape.hidden, self.shape.top_k
        x = ggml.new_tensor_2d(context, F32, h, tokens)
        ids = ggml.new_tensor_2d(context, I32, top, tokens)
        weights = ggml.new_tensor_3d(context, F32, 1, top, tokens)
        for tensor in (x, ids, weights):
            ggml.set_input(tensor)
        made = ggml.new_graph(context)
        rows = ggml.reshape_3d(context, x, h, 1, tokens)
        if ggml.ik:
            hidden = ggml.moe_up_gate(context, up, gate, rows, ids, SILU)
            return Graph(
                made, x, ids, weights, ggml.mul_multi_add(context, ggml.mul_mat_id(context, down, hidden, ids), weights)
            )
        u, g = ggml.mul_mat_id(context, up, rows, ids), ggml.mul_mat_id(context, gate, rows, ids)
        each = ggml.mul_mat_id(context, down, ggml.swiglu_split(context, g, u), ids)
        each = ggml.mul(context, each, weights)
        ggml.build_forward_expand(made, each)
        views = [ggml.view_2d(context, each, h, tokens, h * top * 4, slot * h * 4) for slot in range(top)]
        out = views[0]
        for view in views[1:]:
            out = ggml.add(context, out, view)
            ggml.build_forward_expand(made, out)
        return Graph(made, x, ids, weights, out)

    def load(self, given: Inputs) -> None:
        if given.tokens != self.tokens:
            self.prepare(given.tokens)
        self.at = (self.at + 1) % self.copies
        graph = self.graphs[self.at]
        for tensor, array in ((graph.x, given.x), (graph.ids, given.ids), (graph.weights, given.weights)):
            if tensor:
                self.ggml.backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)

    def run(self) -> None:
        status = self.ggml.backend_graph_compute(self.owner.backend, self.graphs[self.at].made)
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

    def result(self) -> Array:
        self.ggml.backend_tensor_get(self.graphs[self.at].out, self.y.ctypes.data, 0, self.y.nbytes)
        return self.y

    def forget(self) -> None:
        """Frees the graphs."""
        if self.allocator:
            self.ggml.gallocr_free(self.allocator)
        if self.context:
            self.ggml.free(self.context)
        self.allocator, self.context, self.graphs, self.tokens = None, None, [], 0

    def close(self) -> None:
        self.forget()
        self.ggml.backend_buffer_free(self.buffer)
        self.ggml.free(self.holder)
