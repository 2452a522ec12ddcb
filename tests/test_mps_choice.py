"""When the Apple GPU path is on, what is said when it is not, and which device a model then goes to."""

from __future__ import annotations

import json
import platform

import pytest
import torch
from torch import nn

import metal_marlin._C as _C
from metal_marlin import TrellisExperts, TrellisLinear, TrellisMoE, TrellisRouter, TrellisStack, mps
from metal_marlin.__main__ import main


def pretend(monkeypatch, system="Darwin", machine="arm64", macos="15.3", built=True, missing=None, available=True):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), machine))
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: built)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available)
    monkeypatch.setattr(_C, "mps_problem", lambda: missing)


REASONS = [
    ({"system": "Linux", "macos": ""}, "this is Linux; expected macOS"),
    ({"machine": "x86_64"}, "this Python runs as x86_64; expected arm64"),
    ({"macos": "13.6.1"}, "this is macOS 13.6.1; expected 14.0 or newer"),
    ({"built": False, "missing": "x", "available": False}, "was built without MPS; expected the macOS arm64 build"),
    ({"missing": "this torch lacks the symbol x"}, "this torch lacks the symbol x; expected torch 2.10 or newer"),
    ({"available": False}, "torch.backends.mps.is_available() is False"),
]


@pytest.mark.parametrize(("facts", "reason"), REASONS, ids=[reason for _, reason in REASONS])
def test_reason(monkeypatch, capsys, facts, reason):
    pretend(monkeypatch, **facts)
    assert reason in mps.mps_problem()
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["mps"]
    assert found["active"] is False
    assert reason in found["reason"]
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"not active: {found['reason']}" in text
    assert "Metal kernels: in, not run on a Mac yet" in text


@pytest.mark.parametrize("macos", ["14.0", "15", "26.1.2"])
def test_active(monkeypatch, capsys, macos):
    pretend(monkeypatch, macos=macos)
    assert mps.mps_problem() is None
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["mps"]
    assert (found["active"], found["reason"], found["macos"]) == (True, None, macos)
    assert main(["info"]) == 0
    assert "Apple GPU     active: tensors on mps" in capsys.readouterr().out


# ---------------------------------------------------------------- loading


@pytest.fixture
def quantizer():
    pytest.importorskip("transformers")
    from metal_marlin import hf

    return hf.Exl3Quantizer(hf.Exl3Config(), pre_quantized=True)


@pytest.mark.parametrize("place", ["mps", "mps:0", torch.device("mps"), torch.device("mps", 0)], ids=str)
def test_device_map_mps(monkeypatch, quantizer, place):
    pretend(monkeypatch)
    quantizer.validate_environment(device_map=place)
    quantizer.validate_environment(device_map={"": place})
    pretend(monkeypatch, macos="13.1")
    for device_map in (place, {"": place}):
        with pytest.raises(NotImplementedError, match=r"on the CPU only: this is macOS 13.1; expected 14.0 or newer"):
            quantizer.validate_environment(device_map=device_map)


@pytest.mark.parametrize("place", ["cuda:0", 0, "disk", torch.device("cuda")], ids=str)
def test_other_devices_are_refused(monkeypatch, quantizer, place):
    pretend(monkeypatch)
    with pytest.raises(NotImplementedError, match=f"device_map asks for {place}; .* on the CPU and on mps only$"):
        quantizer.validate_environment(device_map={"": place})
    pretend(monkeypatch, system="Linux")
    with pytest.raises(NotImplementedError, match=f"device_map asks for {place}; .* on the CPU only$"):
        quantizer.validate_environment(device_map={"": place})


def test_auto_is_mps_where_it_runs(monkeypatch, quantizer):
    pretend(monkeypatch)
    assert quantizer.update_device_map("auto") == {"": "mps"}
    assert quantizer.update_device_map(None) is None
    assert quantizer.update_device_map({"": "cpu"}) == {"": "cpu"}
    pretend(monkeypatch, available=False)
    assert quantizer.update_device_map("auto") == {"": "cpu"}


# ---------------------------------------------------------------- moving


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers (those that are not saved as well), and tensors that are plain attributes."""
    found: dict[str, torch.Tensor] = {}
    for path, part in module.named_modules():
        for name, value in (*vars(part).items(), *part._parameters.items(), *part._buffers.items()):
            if isinstance(value, torch.Tensor):
                found[f"{path}.{name}"] = value
    return found


def test_modules_move_whole():
    def stack(k: int, n: int) -> TrellisStack:
        return TrellisStack(k, n, [4, 5, 6], ["mcg", "mul1", "3inst"], bias=True)

    router = TrellisRouter(torch.zeros(3, 200), 2, kind="sigmoid_topk", correction=torch.zeros(3))
    experts = TrellisExperts(stack(256, 128), stack(256, 128), stack(128, 256), 200, 100)
    shared = TrellisLinear(200, 200, bits=2.5, codebook="mul1", bias=True)
    module = TrellisMoE(router, experts, shared)
    before = {name: tensor.dtype for name, tensor in tensors_of(module).items()}
    assert len(before) == 2 + 3 * 5 + 5
    after = tensors_of(module.to("meta"))
    assert {name: tensor.dtype for name, tensor in after.items()} == before
    assert {tensor.device.type for tensor in after.values()} == {"meta"}


def test_a_loaded_model_moves_whole():
    transformers = pytest.importorskip("transformers")
    import metal_marlin.hf  # noqa: F401
    from metal_marlin.cli_demo import bundled

    model = transformers.AutoModelForCausalLM.from_pretrained(str(bundled()), local_files_only=True)
    assert {tensor.device.type for tensor in tensors_of(model).values()} == {"cpu"}
    model.to("meta")
    assert [name for name, tensor in tensors_of(model).items() if tensor.device.type != "meta"] == []
