"""The command line on the bundled model and on the mistakes people make: one line, exit status 2, no traceback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import metal_marlin._C as _C
from metal_marlin import perplexity as metrics
from metal_marlin.__main__ import main
from metal_marlin.cli_inspect import kind_of

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tiny-moe"
REFERENCE = json.loads((MODEL / "reference.json").read_text())


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """python -m metal_marlin ... in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "metal_marlin", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )


def json_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------- info, inspect


def test_info(capsys):
    found = json_of(capsys, "info")
    assert found["torch"] == torch.__version__
    assert found["cpu"]["level"] == _C.cpu_level()
    assert found["cpu"]["level"] in found["cpu"]["levels"]
    assert found["mps"]["active"] is False
    assert found["mps"]["reason"]
    assert set(found["codebooks"]) == set(_C.CODEBOOKS)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "Apple GPU     not active" in text
    assert _C.cpu_level() in text


@pytest.mark.parametrize("level", _C.cpu_levels())
def test_info_says_which_level_was_asked_for(level):
    result = command("info", METAL_MARLIN_CPU=level)
    assert result.returncode == 0, result.stderr
    assert f"active: {level} kernels" in result.stdout
    assert f"METAL_MARLIN_CPU={level}" in result.stdout


def test_unknown_level_is_an_error():
    result = command("info", METAL_MARLIN_CPU="avx1024")
    assert result.returncode != 0
    assert "METAL_MARLIN_CPU is 'avx1024'" in result.stderr
    assert "scalar" in result.stderr


def test_inspect_accounts_for_every_byte(capsys):
    found = json_of(capsys, "inspect", MODEL, "--all")
    assert found["model_type"] == "qwen3_moe"
    assert found["bytes"] == sum(tensor["nbytes"] for tensor in found["tensors"])
    assert found["bytes"] == sum(row["nbytes"] for row in found["groups"]) == found["totals"]["all"]["bytes"]
    assert 0 < (MODEL / "model.safetensors").stat().st_size - found["bytes"] < 200_000  # the header
    assert found["totals"]["all"]["weights"] == REFERENCE["weights"]
    experts = [row for row in found["groups"] if row["kind"] == "experts"]
    assert [(row["count"], row["shape"], row["bits"], row["stored"]) for row in experts] == [
        (96, [256, 256], 2, "mul1")
    ] * 3
    assert {row["runs"] for row in experts} == {"moe_trellis_swiglu"}
    head = next(tensor for tensor in found["tensors"] if tensor["name"] == "lm_head")
    assert (head["bits"], head["runs"], head["shape"]) == (6, "trellis_linear", [256, 4096])


def test_inspect_text(capsys):
    assert main(["inspect", str(MODEL)]) == 0
    text = capsys.readouterr().out
    assert "model.layers.*.mlp.experts.*.gate_proj" in text
    assert len(text.splitlines()) < 40
    assert main(["inspect", str(MODEL), "--all"]) == 0
    assert "model.layers.5.mlp.experts.15.gate_proj " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.mlp.experts.3.up_proj", "experts"),
        ("model.layers.0.block_sparse_moe.experts.3.w1", "experts"),
        ("model.layers.0.mlp.shared_experts.down_proj", "shared experts"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "routers"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", "routers"),
        ("model.layers.0.mlp.router.weight", "routers"),
        ("model.layers.0.block_sparse_moe.gate.weight", "routers"),
        ("model.layers.0.mlp.gate_proj", "dense layers"),
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("model.layers.0.self_attn.q_norm.weight", "norms"),
        ("model.layers.0.input_layernorm.weight", "norms"),
        ("model.norm.weight", "norms"),
        ("model.embed_tokens.weight", "embeddings"),
        ("lm_head", "head"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name, quantized=not name.endswith("weight")) == kind


def test_a_reader_that_leaves_is_no_error():
    script = f"{sys.executable!r} -m metal_marlin inspect {str(MODEL)!r} --all | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.stderr == ""


# ---------------------------------------------------------------- generate, perplexity, demo


def test_generate(capsys):
    def text(*options: str) -> str:
        assert main(["generate", str(MODEL), "DESCRIPTION\nThe", "--max-new-tokens", "12", *options]) == 0
        return capsys.readouterr().out

    greedy = text("--temperature", "0")
    assert greedy.startswith("DESCRIPTION\nThe")
    assert greedy == text("--temperature", "0")
    sampled = text("--temperature", "1.5", "--seed", "3")
    assert sampled == text("--temperature", "1.5", "--seed", "3")
    assert sampled != text("--temperature", "1.5", "--seed", "4")


def test_perplexity_of_the_bundled_text(capsys):
    """As recorded; the tolerance is for another machine's order of additions, not for another result."""
    found = json_of(capsys, "perplexity", MODEL, MODEL / "heldout.txt")
    assert (found["windows"], found["length"]) == (REFERENCE["text"]["windows"], REFERENCE["text"]["length"])
    assert found["perplexity"] == pytest.approx(REFERENCE["quantized"]["perplexity"], abs=5e-3)


def test_bundled_text_is_the_measured_one():
    content = (MODEL / REFERENCE["text"]["file"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == REFERENCE["text"]["sha256"], "figures were recorded for another text"


def test_demo():
    result = command("demo")
    assert result.returncode == 0, result.stderr
    for wanted in (
        "2 bits a weight (mul1)",
        "perplexity   21.9",
        "bf16 model has 19.86",
        "prefill",
        "decode",
        "/*\n * This",
    ):
        assert wanted in result.stdout
    assert "Traceback" not in result.stderr
    assert "warn" not in result.stderr.lower()


# ---------------------------------------------------------------- the protocol of perplexity


def test_documents_end_with_the_separator():
    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    assert metrics.token_ids("ab\0c", encode, 0) == [97, 98, 0, 99, 0]
    assert metrics.token_ids("ab\0\0c\0", encode, 0) == [97, 98, 0, 99, 0]
    assert metrics.token_ids("ab\0c", encode, None) == [97, 98, 99]


def test_windows_do_not_overlap_and_are_whole():
    windows = metrics.cut_windows(list(range(23)), 5)
    assert windows.tolist() == [list(range(i, i + 5)) for i in (0, 5, 10, 15)]
    assert metrics.cut_windows(list(range(23)), 5, 2).shape == (2, 5)
    assert metrics.cut_windows(list(range(23)), 5, 9).shape == (4, 5)


class Table(torch.nn.Module):
    """A bigram model: what follows a token depends on that token only."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)
        self.config = self

    def get_text_config(self) -> Table:
        return self

    @property
    def vocab_size(self) -> int:
        return len(self.logits)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Table:
        answer = Table(self.logits)
        answer.logits = torch.nn.Parameter(self.logits[input_ids])
        return answer


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_perplexity_of_a_bigram_model(batch):
    torch.manual_seed(0)
    model, windows = Table(torch.randn(11, 11)), torch.randint(0, 11, (4, 6))
    chances = torch.softmax(model.logits.detach().double(), -1)
    losses = [-torch.log(chances[a, b]) for row in windows.tolist() for a, b in pairwise(row)]
    found = metrics.perplexity(model, windows, batch=batch, progress=False)
    assert found.targets == len(losses) == 20
    assert found.perplexity == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-6)


def test_uniform_model_has_the_vocabulary_as_perplexity():
    found = metrics.perplexity(Table(torch.zeros(50, 50)), torch.zeros(1, 8, dtype=torch.int64), progress=False)
    assert found.perplexity == pytest.approx(50)


def test_ids_outside_the_vocabulary_are_an_error():
    with pytest.raises(ValueError, match="token id 50 is not in the model's vocabulary of 50"):
        metrics.perplexity(Table(torch.zeros(50, 50)), torch.full((1, 8), 50), progress=False)


# ---------------------------------------------------------------- mistakes


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of broken model folders."""
    root = tmp_path_factory.mktemp("mistakes")
    for name in ("empty", "dense", "pickles", "truncated", "no_config", "bad_json"):
        (root / name).mkdir()
    save_file({"model.norm.weight": torch.ones(4)}, root / "dense" / "model.safetensors")
    (root / "dense" / "config.json").write_text('{"model_type": "llama"}')
    (root / "pickles" / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    whole = (MODEL / "model.safetensors").read_bytes()
    (root / "truncated" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (root / "truncated" / file).write_bytes((MODEL / file).read_bytes())
    (root / "no_config" / "model.safetensors").write_bytes(whole)
    (root / "bad_json" / "config.json").write_text("{")
    (root / "short.txt").write_text("Too short.")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    return root


MISTAKES = [
    (["inspect", "{}/nowhere"], "nowhere is not a directory"),
    (["inspect", "{}/short.txt"], "short.txt is not a directory"),
    (["inspect", "{}/empty"], "model.safetensors"),
    (["inspect", "{}/dense"], "is not an EXL3 model: none of its 1 tensors is a .trellis"),
    (["inspect", "{}/pickles"], "pickles"),
    (["inspect", "{}/truncated"], "truncated"),
    (["inspect", "{}/bad_json"], "config.json"),
    (["generate", "{}/nowhere", "x"], "nowhere is not a directory"),
    (["generate", "{}/empty", "x"], "has no config.json"),
    (["generate", "{}/truncated", "x"], "truncated"),
    (["generate", "{model}", ""], "the prompt is empty"),
    (["generate", "{model}", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0; expected at least 1"),
    (["generate", "{model}", "x", "--temperature", "-1"], "--temperature is -1; expected 0 or more"),
    (["generate", "{model}", "x", "--temperature", "nan"], "--temperature is nan; expected 0 or more"),
    (["generate", "{model}", "x", "--top-p", "0"], "--top-p is 0; expected more than 0"),
    (["perplexity", "{model}", "{}/nowhere.txt"], "nowhere.txt is not a file"),
    (["perplexity", "{model}", "{}/latin.txt"], "utf-8"),
    (["perplexity", "{model}", "{}/short.txt"], "the text has 5 tokens; one window needs 512"),
    (["perplexity", "{model}", "{}/short.txt", "--length", "1"], "length is 1; a window needs at least 2 tokens"),
    (["perplexity", "{model}", "{}/short.txt", "--windows", "0"], "windows is 0; expected at least 1"),
    (["perplexity", "{model}", "{}/short.txt", "--batch", "0"], "--batch is 0; expected at least 1"),
    (["demo", "{}/nowhere"], "reference.json is missing"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_mistakes(capsys, folders, arguments, message):
    status = main([argument.replace("{model}", str(MODEL)).replace("{}", str(folders)) for argument in arguments])
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err
    assert captured.err.splitlines()[-1].startswith(("metal_marlin: ", "  "))
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_debug_shows_the_traceback(folders):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main(["inspect", str(folders / "nowhere"), "--debug"])


def test_other_failures_have_status_1(capsys, monkeypatch):
    monkeypatch.setattr("metal_marlin.cli_info.facts", lambda: {}["nothing"])
    assert main(["info"]) == 1
    assert "metal_marlin: KeyError: 'nothing'\nmetal_marlin: add --debug" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["generate"], ["generate", "x", "y", "--dtype", "int4"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: metal_marlin" in capsys.readouterr().err


def test_without_transformers(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # the import statement then fails
    assert main(["generate", str(MODEL), "x"]) == 2
    assert "transformers is not installed" in capsys.readouterr().err
