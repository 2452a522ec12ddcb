"""Who takes part: our levels and the peers, the module that wraps each, and how to install it. Imports none of them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from benchmarks.cpu.contender import Absent, Contender, Options

OURS = "metal_marlin"


@dataclass(frozen=True)
class Entry:
    """module: the file that wraps the library, imported in a worker only. install: what makes it present."""

    name: str
    module: str
    kind: str
    title: str
    install: str = ""

    def make(self, options: Options) -> Contender:
        """The contender, in this process. Absent: it can't be used here."""
        try:
            made = getattr(importlib.import_module(f"benchmarks.cpu.{self.module}"), self.kind)
        except ImportError as error:
            raise Absent(str(error)) from None
        contender: Contender = made(options)
        return contender


IK_INSTALL = (
    "git clone https://github.com/ikawrakow/ik_llama.cpp && cmake -B ik_llama.cpp/build -S ik_llama.cpp"
    " -DGGML_NATIVE=ON && cmake --build ik_llama.cpp/build --target ggml -j2;"
    " export METAL_MARLIN_IK_GGML=$PWD/ik_llama.cpp/build/ggml/src/libggml.so"
)
ENTRIES = {
    entry.name: entry
    for entry in (
        Entry(OURS, "ours", "Ours", "metal_marlin"),
        Entry("ik", "ggml", "IkLlama", "ik_llama.cpp", IK_INSTALL),
        Entry("ggml", "ggml", "Ggml", "ggml", "pip install llama-cpp-python"),
        Entry("onnxruntime", "ort", "OnnxRuntime", "ONNX Runtime", "pip install onnxruntime onnx"),
        Entry("transformers", "hf", "Transformers", "transformers", "pip install 'metal_marlin[hf]'"),
        Entry("torch", "dense", "Dense", "torch", "pip install torch"),
    )
}
PEERS = tuple(name for name in ENTRIES if name != OURS)
EVERY_PEER = "pip install 'metal_marlin[peers]'"
