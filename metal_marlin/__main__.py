"""The command line: python -m metal_marlin COMMAND; --help lists them.

Owns the arguments and what an error looks like: a mistake of the user's is one line on stderr and exit status 2,
anything else that fails one line and status 1, and --debug shows the traceback of either.
What a command does is in cli_*.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

DTYPES = ("float32", "bfloat16", "float16", "auto")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    machine = argparse.ArgumentParser(add_help=False)
    machine.add_argument("--json", action="store_true", help="print one JSON object instead of text")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("directory", metavar="DIR", help="a model folder: config.json, tokenizer, safetensors")
    model.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="type of activations and unquantized weights (default: %(default)s)",
    )
    model.add_argument("--device", choices=("cpu", "mps"), default="cpu", help="where to run (default: %(default)s)")

    memory = argparse.ArgumentParser(add_help=False)
    memory.add_argument(
        "--cache-gb",
        type=float,
        metavar="GB",
        help="keep so much of the experts in memory, read the others when needed",
    )
    memory.add_argument("--no-check", action="store_true", help="load a model even if it doesn't fit into memory")

    top = argparse.ArgumentParser(prog="metal_marlin", description="Trellis-quantized (EXL3) models in PyTorch.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser(
        "info", parents=[common, machine], help="versions, the active backend, and why another one isn't"
    )

    inspect = commands.add_parser(
        "inspect", parents=[common, machine], help="what an EXL3 folder holds and what would run it"
    )
    inspect.add_argument("directory", metavar="DIR", help="a folder with safetensors; no weights are loaded")
    inspect.add_argument("--all", action="store_true", help="one line for every tensor, not for every group")

    fit = commands.add_parser("fit", parents=[common, machine, model], help="whether a model fits into memory here")
    fit.add_argument("--context", type=int, metavar="N", help="tokens in all (default: 4096, or the model's most)")

    repack = commands.add_parser(
        "repack", parents=[common], help="write a checkpoint anew with tiles at cache lines: runs faster when mapped"
    )
    repack.add_argument("directory", metavar="DIR", help="a folder with safetensors")
    repack.add_argument("out", metavar="OUT", help="a new folder, which gets everything but pickles and subfolders")

    generate = commands.add_parser("generate", parents=[common, model, memory], help="continue a text")
    generate.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from standard input")
    generate.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="stop after N tokens (default: %(default)s)"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.7, help="0 always takes the likeliest token (default: %(default)s)"
    )
    generate.add_argument(
        "--top-p", type=float, default=0.95, help="sample from this much of the probability (default: %(default)s)"
    )
    generate.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")

    perplexity = commands.add_parser(
        "perplexity", parents=[common, machine, model, memory], help="perplexity on a text file"
    )
    perplexity.add_argument("text", metavar="TEXT", help="a UTF-8 file; NUL separates documents")
    perplexity.add_argument("--windows", type=int, metavar="N", help="only the first N windows (default: all)")
    perplexity.add_argument(
        "--length", type=int, default=512, metavar="N", help="tokens in a window (default: %(default)s)"
    )
    perplexity.add_argument(
        "--batch", type=int, metavar="N", help="windows in a forward pass (default: by vocabulary, up to 8)"
    )

    from metal_marlin import cli_quantize

    cli_quantize.add_arguments(
        commands.add_parser(
            "quantize", parents=[common], help="make an EXL3 folder of an unquantized one",
            description="Makes an EXL3 folder, for exllamav3 and this package, of an unquantized Hugging Face model."
            " An interrupted run is taken up by the same command. docs/quantize.md says what to choose.",
        )
    )  # fmt: skip

    demo = commands.add_parser("demo", parents=[common], help="load the bundled model, measure it, and let it write")
    demo.add_argument("directory", metavar="DIR", nargs="?", help="another folder laid out like models/tiny-moe")

    selftest = commands.add_parser(
        "selftest", parents=[common, machine], help="run every kernel on this machine's GPU and compare it with the CPU"
    )
    selftest.add_argument(
        "--report",
        default="metal_marlin-selftest.md",
        metavar="FILE",
        help="write what was found here, to be attached to a bug report (default: %(default)s)",
    )
    amount = selftest.add_mutually_exclusive_group()
    amount.add_argument("--quick", action="store_true", help="every codebook, rate, dtype, ... once")
    amount.add_argument("--all", action="store_true", help="every combination of them: many hours")
    selftest.add_argument("--only", metavar="TEXT", help="only what has TEXT in its name, as the report spells it")
    return top


def run(arguments: argparse.Namespace) -> int:
    """Runs one command; returns its exit status. The import is late so that `--help` needs no torch model code."""
    if arguments.command == "info":
        from metal_marlin import cli_info as command
    elif arguments.command == "inspect":
        from metal_marlin import cli_inspect as command  # type: ignore[no-redef]
    elif arguments.command == "fit":
        from metal_marlin import cli_fit as command  # type: ignore[no-redef]
    elif arguments.command == "repack":
        from metal_marlin import cli_repack as command  # type: ignore[no-redef]
    elif arguments.command == "quantize":
        from metal_marlin import cli_quantize as command  # type: ignore[no-redef]
    elif arguments.command == "demo":
        from metal_marlin import cli_demo as command  # type: ignore[no-redef]
    elif arguments.command == "selftest":
        from metal_marlin import selftest as command  # type: ignore[no-redef]
    else:
        from metal_marlin import cli_run as command  # type: ignore[no-redef]
    return getattr(command, arguments.command)(arguments) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 (failed), 2 (the user's mistake), 130 (interrupted)."""
    arguments = parser().parse_args(argv)
    try:
        return run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the reader left: nothing to say, and nobody to say it to
        return 0
    except Exception as error:
        if arguments.debug:
            raise
        mistake = isinstance(error, (ValueError, OSError, ImportError, MemoryError)) and str(
            error
        )  # our checks, the files
        kind = "" if mistake else f"{type(error).__name__}: "
        print(f"metal_marlin: {kind}{error}", file=sys.stderr)
        if not mistake:
            print("metal_marlin: add --debug to see where this happened", file=sys.stderr)
        return 2 if mistake else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
