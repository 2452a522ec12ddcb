"""ONNX Runtime's QMoE operator as a contender: int2 and int4 in blocks, float32 in and out.

A session holds one QMoE node for each copy of the layer and a run executes all of them; the time is divided by their
number. So the cost of entering the session is shared by the copies, which is in this peer's favour.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.cpu.contender import Absent, Contender, Options, Variant, Work, copies_for, limit_of
from benchmarks.cpu.shapes import Array, Inputs, Shape, normal

FORMS = {"QMoE int2 b128": (2, 128, 0), "QMoE int4 b128": (4, 128, 4), "QMoE int4 b32": (4, 32, 4)}  # accuracy_level
ROWS = 64
FAR = -60.0  # the logit of an expert that is not picked


def quantized(weights: Array, bits: int, block: int) -> tuple[Array, Array]:
    """Packed codes uint8 [.., k * bits / 8] and scales float32 [.., k / block]; symmetric, as ONNX Runtime's own tool
    rounds: at 4 bits the value of largest size becomes -8; at 2 bits the mean size is the step, which errs less."""
    blocks = weights.reshape(*weights.shape[:-1], weights.shape[-1] // block, block)
    zero = 1 << (bits - 1)
    if bits == 2:
        scale = np.abs(blocks).mean(-1, keepdims=True) * np.float32(0.99)
    else:
        where = np.abs(blocks).argmax(-1)
        scale = -np.take_along_axis(blocks, where[..., None], -1) / zero
    scale = np.where(scale == 0, 1, scale).astype(np.float32)
    codes = np.clip(np.rint(blocks / scale) + zero, 0, 2 * zero - 1).astype(np.uint8).reshape(weights.shape)
    per_byte = 8 // bits
    parts = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte)
    packed = np.zeros(parts.shape[:-1], np.uint8)
    for i in range(per_byte):
        packed |= parts[..., i] << np.uint8(bits * i)
    return packed, scale[..., 0]


class OnnxRuntime(Contender):
    """The CPU execution provider."""

    def __init__(self, options: Options) -> None:
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise Absent(str(error)) from None
        self.onnx, self.runtime, self.options = onnx, onnxruntime, options

    def facts(self) -> dict[str, str]:
        return {"version": self.runtime.__version__, "onnx": self.onnx.__version__}

    def variants(self, op: str) -> list[Variant]:
        if op != "moe":
            return []
        return [Variant(name, bits + 32 / block, limit_of(bits), "scalar") for name, (bits, block, _) in FORMS.items()]

    def bytes_needed(self, shape: Shape, variant: str, cold_bytes: int) -> int:
        bits, block, _ = FORMS[variant]
        layer = shape.weights * (bits + 32 / block) / 8
        return int(layer * copies_for(layer, cold_bytes))

    def build(self, shape: Shape, variant: str, cold_bytes: int, weights: tuple[Array, ...] | None) -> Work:
        layer = self.bytes_needed(shape, variant, 0)
        copies = 1 if weights is not None else copies_for(layer, cold_bytes)
        return Session(self, shape, variant, copies, weights)


class Session(Work):
    """A model of `copies` QMoE nodes that share their tokens and have a routing of their own each."""

    def __init__(
        self, owner: OnnxRuntime, shape: Shape, variant: str, copies: int, weights: tuple[Array, ...] | None
    ) -> None:
        self.shape, self.copies, self.calls = shape, copies, copies
        self.form = FORMS[variant]
        self.matrix_bytes = owner.bytes_needed(shape, variant, 0) / shape.experts
        runtime, helper, proto = owner.runtime, owner.onnx.helper, owner.onnx.TensorProto
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = owner.options.threads, 1
        options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        if not owner.options.spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        bits, block, level = self.form
        settings: dict[str, Any] = {
            "k": shape.top_k, "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0,
            "activation_beta": 0.0, "normalize_routing_weights": 1, "expert_weight_bits": bits, "block_size": block,
        }  # fmt: skip
        if level:
            settings["accuracy_level"] = level
        floats = proto.FLOAT
        inputs = [helper.make_tensor_value_info("x", floats, ["tokens", shape.hidden])]
        nodes, outputs, stubs, names, values = [], [], [], [], []
        for copy in range(copies):
            arrays = self.arrays(weights)
            fields = [f"{part}{copy}" for part in ("codes_in", "scales_in", "codes_out", "scales_out")]
            for name, array in zip(fields, arrays, strict=True):
                names.append(name)
                values.append(runtime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))
                stub = proto()  # says what the initializer is like; its data is handed to the session
                stub.name, stub.data_location = name, proto.EXTERNAL
                stub.data_type = proto.UINT8 if array.dtype == np.uint8 else floats
                stub.dims.extend(array.shape)
                place = stub.external_data.add()
                place.key, place.value = "location", "memory"
                stubs.append(stub)
            arguments = ["x", f"logits{copy}", fields[0], fields[1], "", fields[2], fields[3]]
            nodes.append(helper.make_node("QMoE", arguments, [f"y{copy}"], domain="com.microsoft", **settings))
            inputs.append(helper.make_tensor_value_info(f"logits{copy}", floats, ["tokens", shape.experts]))
            outputs.append(helper.make_tensor_value_info(f"y{copy}", floats, ["tokens", shape.hidden]))
        graph = helper.make_graph(nodes, "layers", inputs, outputs, stubs)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options.add_external_initializers(names, values)
        self.kept = values
        self.session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.feed: dict[str, Array] = {}

    def arrays(self, weights: tuple[Array, ...] | None) -> list[Array]:
        """Codes and scales of gate and up, their rows in turns, and of down."""
        e, h, i = self.shape.experts, self.shape.hidden, self.shape.inner
        bits, block, _ = self.form
        if weights is not None:
            gate_up = np.stack(weights[:2], 2).reshape(e, 2 * i, h)
            return [*quantized(gate_up, bits, block), *quantized(weights[2], bits, block)]
        found: list[Array] = []
        for rows, columns in ((2 * i, h), (h, i)):
            some = quantized(normal((columns,), ROWS, columns), bits, block)
            found += [np.tile(part, (e * rows // ROWS, 1)).reshape(e, rows, -1) for part in some]
        return found

    def load(self, given: Inputs) -> None:
        self.feed = {"x": given.x}
        for copy in range(self.copies):
            # every layer another routing: the tokens' lists of experts, handed round
            ids, weights = np.roll(given.ids, copy, 0), np.roll(given.weights, copy, 0)
            if copy:
                ids = (ids + copy * 7) % self.shape.experts
            logits = np.full((given.tokens, self.shape.experts), FAR, np.float32)
            np.put_along_axis(logits, ids.astype(np.int64), np.log(weights), 1)
            self.feed[f"logits{copy}"] = logits

    def run(self) -> None:
        self.outputs = self.session.run(None, self.feed)

    def result(self) -> Array:
        array: Array = self.outputs[0]
        return array
