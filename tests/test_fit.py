"""Does a model fit: the arithmetic by hand, free memory from made-up control groups, the refusal, the command."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from metal_marlin import Checkpoint, fit
from metal_marlin.__main__ import main
from metal_marlin.fit import Free

MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny-moe"
#: Of the bundled model: 6 layers of 16 experts of 3 matrices [256, 256] at 2 bits.
EXPERT = 3 * 256 * 256 * 2 // 8


def need(**kwargs: Any) -> fit.Need:
    checkpoint = Checkpoint(MODEL)
    return fit.need_of(checkpoint, checkpoint.config, **kwargs)


def test_need_of_the_bundled_model() -> None:
    found = need(context=1000, dtype=torch.float32)
    assert (found.experts, found.expert_bytes, found.top_k) == (96 * EXPERT, EXPERT, 4)
    assert found.least_cache == 4 * EXPERT
    assert found.kv_cache == 6 * 1000 * 2 * 2 * 64 * 4  # layers, tokens, keys and values, heads, their size, float32
    assert found.total() == found.experts + found.dense + found.kv_cache + found.activations
    assert found.total() - found.total(10 * EXPERT) == 86 * EXPERT
    assert found.total(10**12) == found.total()
    stored = Checkpoint(MODEL).nbytes
    scales = (".suh", ".svh", ".trellis", ".mul1")
    plain = sum(i.nbytes for n, i in Checkpoint(MODEL).tensors.items() if not n.endswith(scales))
    assert found.experts + found.dense == stored + plain  # 16 bits become 32
    halved = need(context=1000, dtype=torch.bfloat16)
    assert (halved.experts + halved.dense, halved.kv_cache) == (stored, found.kv_cache // 2)


def test_context() -> None:
    assert need().context == 2048  # the model's most
    with pytest.raises(ValueError, match="context is -1; expected at least 1"):
        need(context=-1)


CACHES: dict[str, tuple[dict[str, Any], int]] = {  # config -> bytes for 1000 tokens in bfloat16
    "heads": ({"num_hidden_layers": 3, "num_attention_heads": 8, "hidden_size": 512}, 3 * 1000 * 2 * 8 * 64 * 2),
    "grouped": (
        {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 100},
        3 * 1000 * 2 * 2 * 100 * 2,
    ),
    "a window in every other layer": (
        {
            "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64,
            "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        2 * (1000 + 128) * 2 * 8 * 64 * 2,
    ),
    "linear attention": (
        {
            "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 64,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        },
        1000 * 2 * 8 * 64 * 2,
    ),
    "compressed": (
        {
            "num_hidden_layers": 2, "num_attention_heads": 16, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "v_head_dim": 128,
        },
        2 * 1000 * 16 * (192 + 128) * 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHES)
def test_kv_cache(name: str) -> None:
    config, want = CACHES[name]
    assert fit.kv_cache_bytes(config, 1000, torch.bfloat16) == want


def test_kv_cache_is_what_transformers_allocates() -> None:
    transformers = pytest.importorskip("transformers")
    import metal_marlin.hf  # noqa: F401

    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.inference_mode():
        cache = model(torch.arange(37).view(1, 37), use_cache=True).past_key_values
    held = sum(tensor.nbytes for kept in cache.layers for tensor in (kept.keys, kept.values))
    assert held == need(context=37, dtype=torch.float32).kv_cache


def test_a_config_without_sizes() -> None:
    with pytest.raises(ValueError, match="num_hidden_layers is None; expected a positive number"):
        fit.kv_cache_bytes({}, 10, torch.float32)


STRANGE = {
    "num_hidden_layers": "6", "num_attention_heads": 2.0, "num_key_value_heads": "2", "head_dim": [64, "64"],
    "hidden_size": -1, "intermediate_size": {}, "vocab_size": "many", "sliding_window": "128", "layer_types": "full",
    "max_position_embeddings": "2048", "num_experts_per_tok": True, "kv_lora_rank": "512", "text_config": "qwen",
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_a_config_with_something_else_for_a_size(name: str) -> None:
    checkpoint = Checkpoint(MODEL)
    value = STRANGE[name] or {"a": 1}
    with pytest.raises(ValueError, match=rf"config\.json: {name} is {re.escape(repr(value))}; expected"):
        fit.need_of(checkpoint, {**checkpoint.config, name: value})


def test_a_size_for_each_layer() -> None:
    checkpoint = Checkpoint(MODEL)
    want = fit.need_of(checkpoint, {**checkpoint.config, "intermediate_size": 900})
    assert fit.need_of(checkpoint, {**checkpoint.config, "intermediate_size": [100, 900, 300]}) == want


def test_the_longest_context_that_fits() -> None:
    """One more does not fit; none longer than the model is made for is proposed."""
    config = Checkpoint(MODEL).config
    asked, room = need(context=10**9), need(context=1234).total() + 5
    found = fit.longest_context(config, asked, room, torch.bfloat16)
    assert need(context=found).total() <= room < need(context=found + 1).total()
    assert fit.longest_context(config, asked, 10**15, torch.bfloat16) == 2048
    assert fit.longest_context(config, asked, 10**6, torch.bfloat16) == 0


@pytest.mark.parametrize(("room", "least"), [(196_610, 196_608), (999_999, 196_608), (52_123_456_789, 10**7), (1, 1)])
def test_gigabytes_can_be_given_back(room: int, least: int) -> None:
    assert least <= round(float(fit.gigabytes(room, least)) * 1e9) <= room


# ---------------------------------------------------------------- free memory


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_control_groups(tmp_path: Path) -> None:
    """The tightest limit on the way up counts, less what is used, and page cache is free."""
    write(
        tmp_path,
        {
            "a/memory.max": "1000\n", "a/memory.current": "900\n", "a/memory.stat": "anon 1\ninactive_file 300\n",
            "a/b/memory.max": "max\n", "a/b/memory.current": "5\n",
            "membership": "0::/a/b\n",
        },
    )  # fmt: skip
    assert fit.cgroup_memory(tmp_path, tmp_path / "membership") == Free(400, 1000, f"{tmp_path}/a/memory.max")
    write(tmp_path, {"a/b/memory.max": "100\n"})
    assert fit.cgroup_memory(tmp_path, tmp_path / "membership") == Free(95, 100, f"{tmp_path}/a/b/memory.max")
    write(tmp_path, {"membership": "0::/\n"})
    assert fit.cgroup_memory(tmp_path, tmp_path / "membership") is None
    assert fit.cgroup_memory(tmp_path, tmp_path / "nothing") is None


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "memory/c/memory.limit_in_bytes": "1000", "memory/c/memory.usage_in_bytes": "700",
            "memory/c/memory.stat": "total_inactive_file 100", "memory/memory.limit_in_bytes": "9223372036854771712",
            "memory/memory.usage_in_bytes": "1", "membership": "3:cpu:/c\n4:memory:/c\n",
        },
    )  # fmt: skip
    found = fit.cgroup_memory(tmp_path, tmp_path / "membership")
    assert found is not None
    assert (found.free, found.total) == (400, 1000)


def test_free_memory_of_this_machine() -> None:
    found = fit.free_memory()
    assert 0 < found.free <= found.total


# ---------------------------------------------------------------- the refusal


def test_refusal() -> None:
    asked = need(context=1000)
    enough = Free(asked.total(), 10**9, "here")
    assert fit.refusal("x", asked, enough) is None
    short = Free(asked.total() - 1, 10**9, "here")
    text = fit.refusal("x", asked, short)
    assert text is not None
    assert text.startswith("x does not fit: it needs 0.08 GB (experts 0.00, other weights")
    assert "KV cache of 1000 tokens 0.00" in text
    assert f"cache_bytes={asked.experts - 1}" in text
    assert "check=False" in text
    assert "iogpu" not in text
    assert fit.refusal("x", asked, short, cache_bytes=4 * EXPERT) is None
    tight = Free(asked.total(0) + 4 * EXPERT - 1, 10**9, "here")
    assert "cache_bytes" not in (fit.refusal("x", asked, tight) or "")  # not even one token's experts


def test_command_for_a_mac() -> None:
    gb = 1 << 30
    assert fit.raise_limit_command(56 * gb, 64 * gb) == "sudo sysctl iogpu.wired_limit_mb=57344"
    assert fit.raise_limit_command(56 * gb + 1, 64 * gb) == "sudo sysctl iogpu.wired_limit_mb=57345"
    assert fit.raise_limit_command(61 * gb, 64 * gb) is None
    text = fit.options(need(), Free(10**6, 48 * gb, "Metal"), gpu=True, machine=64 * gb)
    assert any(line.endswith("sudo sysctl iogpu.wired_limit_mb=77") or "iogpu.wired_limit_mb=" in line for line in text)
    assert not any("cache_bytes" in line for line in text)


def test_the_loader_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    import metal_marlin.hf

    def load() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)

    whole = need(context=100, dtype=torch.float32).total()
    monkeypatch.setattr(fit, "free_memory", lambda: Free(whole, 10**9, "a test"))
    with pytest.raises(MemoryError, match=r"tiny-moe does not fit: it needs 0\.12 GB .*2048 tokens.*\(a test\)"):
        load()
    with metal_marlin.hf.loading(context=100):
        load()
    monkeypatch.setattr(fit, "free_memory", lambda: Free(whole - 50 * EXPERT, 10**9, "a test"))
    with metal_marlin.hf.loading(context=100), pytest.raises(MemoryError, match="cache_bytes="):
        load()
    with metal_marlin.hf.loading(context=100, cache_bytes=40 * EXPERT):
        load()
    with metal_marlin.hf.loading(check=False):
        load()
    with pytest.raises(MemoryError):
        load()


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert main(["fit", str(MODEL)]) == 0
    assert capsys.readouterr().out.endswith("it fits\n")
    assert main(["fit", str(MODEL), "--context", "100", "--dtype", "bfloat16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["needs"]["kv_cache"] == 6 * 100 * 2 * 2 * 64 * 2
    assert found["fits"] is True
    monkeypatch.setattr(fit, "free_memory", lambda: Free(10**6, 10**9, "a test"))
    assert main(["fit", str(MODEL)]) == 1
    assert "it does not fit\n  - " in capsys.readouterr().out
    for arguments, message in (
        (["--context", "0"], "--context is 0; expected at least 1"),
        (["--context", "9" * 400], f"context is {'9' * 400}; expected at least 1, and at most"),
        (["--device", "mps"], "--device is mps, which is off"),
    ):
        if sys.platform == "darwin" and "mps" in arguments:
            continue
        assert main(["fit", str(MODEL), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["fit", str(tmp_path / "nowhere")]) == 2
    capsys.readouterr()
    monkeypatch.setattr(fit, "free_memory", lambda: Free(120_000_000, 10**9, "a test"))
    assert main(["fit", str(MODEL), "--context", "10000"]) == 1
    out = capsys.readouterr().out
    assert "10000 tokens; the model is made for 2048" in out
    assert "a shorter context: --context 2048" in out
    shutil.copy(MODEL / "model.safetensors", tmp_path / "model.safetensors")
    assert main(["fit", str(tmp_path)]) == 2
    assert f"{tmp_path} has no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text((MODEL / "config.json").read_text().replace('"bfloat16"', '["bfloat16"]'))
    assert main(["fit", str(tmp_path)]) in (0, 1)


def test_no_weights_are_read_and_no_transformers(tmp_path: Path) -> None:
    """The command works where transformers is not installed."""
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        f"from metal_marlin.__main__ import main; sys.exit(main(['fit', {str(MODEL)!r}]))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
