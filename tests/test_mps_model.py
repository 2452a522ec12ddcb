"""The bundled 2-bit model through transformers on the emulated MPS backend: the same perplexity as on the CPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import metal_marlin._C as _C

MODEL = Path(__file__).parents[1] / "models" / "tiny-moe"


def test_perplexity_and_decode(emulated: Any) -> None:
    """Two windows of 40 tokens (prefill kernels) within 1e-3 of the CPU's perplexity; one more token with a cache
    (decode kernels, where mul1's weights are not rounded) within 0.05 of its logits."""
    transformers = pytest.importorskip("transformers")
    import metal_marlin.hf
    from metal_marlin import TrellisExperts, TrellisLinear
    from metal_marlin.hf_routers import FusedRouter

    _C.use_mps_emulator(None)  # loading compares routers with the op, and would read results too early
    with metal_marlin.hf.loading(copy=True):  # tiles in a file may begin anywhere; .to("mps") makes aligned copies
        model = transformers.AutoModelForCausalLM.from_pretrained(str(MODEL), dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(MODEL))
    ids = torch.tensor(tokenizer((MODEL / "heldout.txt").read_text()[:2000]).input_ids[:81])
    windows = ids[:80].view(2, 40)
    ours = [m for m in model.modules() if isinstance(m, (TrellisLinear, TrellisExperts, FusedRouter))]
    assert len(ours) == 6 * (4 + 1 + 1) + 1  # four projections, experts and a router a layer, and the head
    for module in ours:  # what torch does next on the CPU would not wait for the emulated stream
        module.register_forward_hook(lambda *_: emulated.synchronize())

    def losses_and_next() -> tuple[float, torch.Tensor]:
        with torch.inference_mode():
            out = model(windows, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(out[:, :-1].reshape(-1, out.shape[-1]), windows[:, 1:].reshape(-1))
            cache = model(windows[1:], use_cache=True).past_key_values
            return float(loss), model(ids[80:].view(1, 1), past_key_values=cache).logits[0, -1]

    _C.use_mps_emulator(emulated.load()._name)
    emulated.reset()
    loss, logits = losses_and_next()
    assert emulated.stats()["dispatches"] > 100
    _C.use_mps_emulator(None)
    want_loss, want_logits = losses_and_next()
    assert abs(math.exp(loss) - math.exp(want_loss)) < 1e-3
    assert (logits - want_logits).abs().max() < 0.05
    assert logits.argmax() == want_logits.argmax()
