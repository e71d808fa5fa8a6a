"""The parser of the command line: sub-commands and their options."""

import argparse

from obr.cli import commands
from obr.cli.options import (
    ERRATA,
    EXPORT,
    OPTIONS,
    PLAN,
    PUSH,
    VERIFY,
    errata_options,
    export_options,
    plan_options,
    push_options,
    verify_options,
)

DESCRIPTION = "The command line: one sub-command per stage. What Snakemake runs can be copied and run by hand."


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="obr", description=DESCRIPTION)
    stages = found.add_subparsers(required=True, metavar="STAGE")

    def stage(name: str, function, text: str, *options: str) -> None:
        command = stages.add_parser(name, help=text, description=text)
        command.set_defaults(stage=function)
        for option in options:
            OPTIONS[option.rstrip("?")](command, not option.endswith("?"))

    stage("download-model", commands.download_model, "Fetch a model into a folder.", "entry", "out")
    stage("check-model", commands.check_model, "Check recipes against a model's sizes.", "entry", "model", "out")
    stage("download-text", commands.download_text, "Fetch a text into a file.", "entry", "out")
    stage("download-documents", commands.download_documents, "Fetch a text's documents into a file.", "entry", "out")
    stage("download-task", commands.download_task, "Fetch a zero-shot task.", "entry", "text?", "out")
    stage(
        "download-rotation", commands.download_rotation, "Make a model's rotation.", "entry", "model", "out", "trust"
    )
    stage(
        "learn-rotation", commands.learn_rotation, "Learn a model's rotation.",
        "entry", "model", "tokens", "out", "compute", "trust",
    )  # fmt: skip
    stage("calibrate", commands.calibrate, "Choose calibration windows.", "entry", "model", "text", "out", "trust")
    stage(
        "generate",
        commands.generate,
        "Let a model write calibration windows.",
        "entry",
        "model",
        "out",
        "compute",
        "trust",
    )
    stage("mix", commands.mix, "Mix calibration windows of several files.", "entry", "windows", "out")
    stage(
        "hessian", commands.hessian, "Collect the Hessians of a model's layer inputs.",
        "model", "rotation?", "tokens", "out", "activations", "compute", "trust",
    )  # fmt: skip
    stage(
        "gradients", commands.gradients, "Measure how much the loss feels each output channel of each layer.",
        "entry", "model", "rotation?", "tokens", "out", "activations", "compute", "trust",
    )  # fmt: skip
    stage(
        "sensitivity", commands.sensitivity, "Predict the loss that each layer costs at several options.",
        "entry", "model", "rotation?", "tokens", "hessians", "gradients", "out", "activations", "compute", "trust",
    )  # fmt: skip
    stage(
        "allocate",
        commands.allocate,
        "Choose an option for each layer under a budget.",
        "entry",
        "sensitivity",
        "out",
    )
    stage(
        "compress", commands.compress, "Compress a model by a recipe.",
        "entry", "model", "rotation?", "tokens?", "hessians?", "gradients?", "allocation?", "out", "activations",
        "compute", "trust",
    )  # fmt: skip
    stage("download-released", commands.download_released, "Fetch a checkpoint of the authors.", "entry", "out")
    stage(
        "released", commands.released, "Verify a checkpoint of the authors and take it over.",
        "entry", "model", "released", "out", "trust",
    )  # fmt: skip
    stage(
        "perplexity", commands.perplexity, "Perplexity of a checkpoint.",
        "entry", "checkpoint", "recipe?", "text", "out", "activations", "compute", "trust",
    )  # fmt: skip
    stage(
        "zero-shot", commands.zero_shot, "Zero-shot accuracy of a checkpoint.",
        "entry", "checkpoint", "recipe?", "task", "out", "compute", "trust",
    )  # fmt: skip
    stage("kernels", commands.kernels, "Time matrix products on this device.", "entry", "out", "compute", "sizes")
    stage("table", commands.table, "Make a table.", "entry", "recipes", "models", "results", "published", "out")
    stage(
        "figure", commands.figure, "Draw a figure.",
        "entry", "recipes", "models", "results", "published", "shapes?", "out",
    )  # fmt: skip
    for name, (function, text, options) in {
        "plan": (commands.plan, PLAN, plan_options),
        "push": (commands.push, PUSH, push_options),
        "verify": (commands.verify, VERIFY, verify_options),
        "export": (commands.export, EXPORT, export_options),
        "errata": (commands.errata, ERRATA, errata_options),
    }.items():
        command = stages.add_parser(name, help=text, description=text)
        command.set_defaults(stage=function)
        options(command)
    return found
