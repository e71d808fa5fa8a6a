"""The parser of the command line: sub-commands and their options."""

import argparse

from obr.cli import commands, evaluate, oneshot
from obr.cli.options import (
    CHECK,
    ERRATA,
    EXPORT,
    OPTIONS,
    PLAN,
    PUSH,
    VERIFY,
    check_options,
    errata_options,
    export_options,
    plan_options,
    push_options,
    verify_options,
)
from obr.cli.stage_settings import StageParser

DESCRIPTION = "Prune and quantise language models (Optimal Brain Restoration)."

# Sub-command -> its function, its help, and the names of its options; "?" marks those that may be left out.
STAGES = {
    "download-model": (commands.download_model, "Fetch a model into a folder.", "settings out rerun"),
    "check-model": (commands.check_model, "Check patterns against the sizes of a model.", "patterns? model out"),
    "download-text": (commands.download_text, "Fetch a text into a file.", "settings out"),
    "download-documents": (commands.download_documents, "Fetch a text's documents into a file.", "settings out"),
    "download-task": (commands.download_task, "Fetch a zero-shot task.", "settings text? out rerun"),
    "download-rotation": (commands.download_rotation, "Make a model's rotation.", "settings model out trust"),
    "learn-rotation": (
        commands.learn_rotation,
        "Learn a model's rotation.",
        "settings model tokens out activations compute trust",
    ),
    "calibrate": (commands.calibrate, "Choose calibration windows.", "settings model text out trust"),
    "generate": (
        commands.generate,
        "Sample calibration windows from a model.",
        "settings model out compute trust",
    ),
    "mix": (commands.mix, "Mix calibration windows of several files.", "settings windows out"),
    "hessian": (
        commands.hessian,
        "Collect the Hessians of a model's layer inputs.",
        "model rotation? tokens out activations compute trust",
    ),
    "gradients": (
        commands.gradients,
        "Measure gradients of the loss with respect to layer outputs.",
        "settings model rotation? tokens out activations compute trust",
    ),
    "sensitivity": (
        commands.sensitivity,
        "Predict the loss of each layer at each option.",
        "settings model rotation? tokens hessians gradients out activations compute trust",
    ),
    "allocate": (
        commands.allocate,
        "Choose an option for each layer within a bit budget.",
        "weights sensitivity out",
    ),
    "compress": (
        commands.compress,
        "Compress a model by a recipe.",
        "weights model rotation? tokens? hessians? gradients? allocation? out activations compute trust",
    ),
    "download-released": (commands.download_released, "Fetch a checkpoint that others made.", "settings out rerun"),
    "released": (
        commands.released,
        "Verify a checkpoint that others made and convert it.",
        "weights model released out trust",
    ),
    "kernels": (commands.kernels, "Benchmark matrix multiplications on this device.", "settings out compute sizes"),
    "table": (commands.table, "Make a table.", "name config results published out"),
    "figure": (commands.figure, "Draw a figure.", "name config results published out"),
}
# Sub-commands with options of their own.
BY_HAND = {
    "quantize": (oneshot.quantize, oneshot.QUANTIZE, oneshot.quantize_options),
    "evaluate": (evaluate.evaluate, evaluate.EVALUATE, evaluate.evaluate_options),
    "recipes": (oneshot.recipes, oneshot.RECIPES, oneshot.recipes_options),
    "export": (commands.export, EXPORT, export_options),
    "push": (commands.push, PUSH, push_options),
    "verify": (commands.verify, VERIFY, verify_options),
    "check": (commands.check, CHECK, check_options),
    "plan": (commands.plan, PLAN, plan_options),
    "errata": (commands.errata, ERRATA, errata_options),
}


def _listed(title: str, commands: dict) -> str:
    """A section of the help: sub-commands with their help, one per line."""
    return "\n".join([f"{title}:", *(f"  {name:<20} {text}" for name, (_, text, _) in commands.items())])


def parser() -> argparse.ArgumentParser:
    """Of the whole command line; a parsed command has its function as `stage`."""
    sections = [
        _listed("commands", BY_HAND),
        _listed("workflow stages (called by Snakemake; its printed commands also run by hand)", STAGES),
        "obr COMMAND --help prints a command's options.",
    ]
    found = argparse.ArgumentParser(
        prog="obr", usage="obr [-h] COMMAND ...", description=DESCRIPTION, epilog="\n\n".join(sections),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    # Without a help of their own, sub-commands are not listed twice.
    chosen = found.add_subparsers(
        required=True, metavar="COMMAND", help=argparse.SUPPRESS, prog="obr", parser_class=StageParser
    )
    for name, (function, text, add_options) in BY_HAND.items():
        command = chosen.add_parser(name, description=text)
        command.set_defaults(stage=function)
        add_options(command)
    for name, (function, text, options) in STAGES.items():
        command = chosen.add_parser(name, description=text)
        command.set_defaults(stage=function)
        for option in options.split():
            OPTIONS[option.rstrip("?")](command, not option.endswith("?"))
    return found
