"""`quantize`: an unquantized model folder to an EXL3 folder.

Owns the command's arguments: which codebook "auto" is, reading the calibration text and the recipe. The work is done in
metal_marlin/quantize.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

from metal_marlin import _C
from metal_marlin.safetensors_header import parse_json

PLACES = ("auto", "cpu", "apple")
CODEBOOKS = ("auto", "mul1", "mcg", "3inst")
BITS = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `quantize`."""
    parser.add_argument("directory", metavar="MODEL_DIR", help="a Hugging Face model in bf16, fp16 or fp32")
    parser.add_argument("out", metavar="OUT_DIR", help="the folder to make; its name must be free")
    parser.add_argument(
        "--bits", type=float, metavar="B",
        help=f"bits per weight, the mean over all linear layers but the head, 1 to 8 (default: {BITS:g})",
    )  # fmt: skip
    parser.add_argument(
        "--head-bits", type=float, default=6.0, metavar="B", help="of the output head (default: %(default)s)"
    )
    parser.add_argument(
        "--calibration", metavar="FILE",
        help="UTF-8 text like what the model will read, NUL between documents; a megabyte is plenty. Without it the"
        " result is much worse",
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=128, metavar="N", help="of calibration (default: %(default)s)")
    parser.add_argument("--length", type=int, default=2048, metavar="N", help="tokens in a row (default: %(default)s)")
    parser.add_argument(
        "--codebook", choices=CODEBOOKS, default="auto",
        help="mul1 is fastest on CPUs and alone has half rates; mcg is cheapest to decode on Apple GPUs (default: by"
        " --for)",
    )  # fmt: skip
    parser.add_argument(
        "--for", choices=PLACES, default="auto", dest="place", help="where the model will run (default: this machine)"
    )
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--uniform", action="store_true", help="one rate for all layers instead of measured ones")
    rates.add_argument(
        "--recipe", metavar="FILE",
        help='JSON or TOML with the rates, {"rates": {"*.experts.gate_up": 2, ...}}; that of a finished run is in its'
        " metal_marlin_quantization.json",
    )  # fmt: skip


def choose_codebook(
    codebook: str, place: str, bits: float, uniform: bool, recipe: dict[str, Any] | None = None
) -> tuple[str, str]:
    """(codebook, why). `bits`, or a recipe's rates, decide where mcg lacks a rate."""
    if codebook != "auto":
        return codebook, "as asked for"
    if place == "auto":
        place = "apple" if platform.system() == "Darwin" and platform.machine() == "arm64" else "cpu"
    if place == "cpu":
        return "mul1", "CPUs multiply it in integers, two to three times as fast as the others"
    rates = (recipe or {}).get("rates")
    if isinstance(rates, dict) and any(isinstance(rate, float) and rate % 1 for rate in rates.values()):
        return "mul1", "mcg, cheaper on Apple GPUs, has whole rates only, and the recipe has others"
    if recipe is None and 2 * bits not in _C.RATES2["mcg"] and (uniform or bits < 2):
        return "mul1", f"mcg, cheaper on Apple GPUs, has whole rates only, which waste much at {bits:g} bits"
    return "mcg", "the cheapest to decode on Apple GPUs; on a CPU, mul1 is two to three times as fast"


def read_recipe(file: Path) -> dict[str, Any]:
    """A recipe's table. ValueError: malformed. FileNotFoundError: no such file."""
    text = file.read_bytes()
    if file.suffix.lower() == ".toml":
        if sys.version_info < (3, 11):
            raise ValueError(f"{file}: TOML needs Python 3.11; expected JSON")
        tomllib = importlib.import_module("tomllib")
        try:
            found = tomllib.loads(text.decode())
        except ValueError as error:
            raise ValueError(f"{file}: malformed TOML: {error}") from None
    else:
        found = parse_json(file, text)
    if not isinstance(found, dict):
        raise ValueError(f"{file}: is a {type(found).__name__}; expected an object")
    return {"rates": found.get("rates")}


def quantize(arguments: argparse.Namespace) -> None:
    """`quantize MODEL_DIR OUT_DIR`."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise ImportError(
            "transformers is not installed; this command needs it: pip install 'metal_marlin[hf]'"
        ) from None
    from metal_marlin.quantize import Options, quantize

    if not Path(arguments.directory).is_dir():
        raise FileNotFoundError(f"{arguments.directory} is not a directory")
    if arguments.recipe and arguments.bits is not None:
        raise ValueError(f"--bits {arguments.bits:g} and --recipe, which gives the bits itself; expected one of them")
    recipe = read_recipe(Path(arguments.recipe)) if arguments.recipe else None
    bits = BITS if arguments.bits is None else arguments.bits
    codebook, why = choose_codebook(arguments.codebook, arguments.place, bits, arguments.uniform, recipe)
    text = None
    if arguments.calibration:
        file = Path(arguments.calibration)
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not a file")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: is not UTF-8 text: {error}") from None
    options = Options(bits, arguments.head_bits, codebook, arguments.uniform, arguments.rows, arguments.length).check()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers")

    def say(line: str) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)  # over the progress line
        try:
            print(line, flush=True)
        except BrokenPipeError:  # the reader left (`| head`); hours of work need none
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    say(f"codebook     {codebook}: {why}")
    try:
        quantize(arguments.directory, arguments.out, options, text=text, recipe=recipe, say=say)
    except KeyboardInterrupt:
        print("metal_marlin: interrupted; the same command goes on with the layer it was at", file=sys.stderr)
        raise
