"""MkDocs hook: pages generated from parser, schema and recipe sheets, and pages of the files that docs/ links to.

The generated pages are of the site alone; `make docs` makes them. Their sources are the project's own files, so they
cannot disagree with them.
"""

import argparse
import csv
import json
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = ROOT / "workflow/schemas/config.schema.yaml"
SHEETS = ROOT / "config/recipes"
CONFIG_FILES = "reference/config-files.md"  # the page of config/README.md
LINK = re.compile(r"(\]\()(\.\.?/[^)\s#]+)(#[^)\s]*)?(?=\))")
HIDDEN = {  # beside pages that need the width
    "index.md": ["navigation"],
    "reference/stages.md": ["toc"],
    "results/small-model.md": ["toc"],
    "results/peers.md": ["toc"],
}
SHORT = 40  # characters of a default in a table
LANGUAGES = {".py": "python", ".cpp": "cpp", ".yaml": "yaml", ".csv": "text", ".smk": "python"}


def _table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; bars and line ends of the cells are kept out of its way."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


# --- the command line


def _subcommands() -> dict[str, argparse.ArgumentParser]:
    """{sub-command: its parser}, commands for people first."""
    sys.path.insert(0, str(ROOT / "workflow"))
    from obr.cli.parser import parser

    (chosen,) = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return chosen.choices


def _option(action: argparse.Action, formatter: argparse.HelpFormatter) -> list[str]:
    """The row of an option: its names with the value that it takes, and its help."""
    if action.option_strings:
        value = "" if action.nargs == 0 else " " + formatter._format_args(action, action.dest.upper())
        name = ", ".join(action.option_strings) + value
    else:
        name = formatter._format_args(action, action.dest.upper())
    return [f"`{name}`", formatter._expand_help(action) if action.help else ""]


def _command(parser: argparse.ArgumentParser) -> Iterator[str]:
    formatter = argparse.HelpFormatter(prog=parser.prog, width=100)
    usage = parser.format_usage().removeprefix("usage: ").rstrip()
    yield f"### {parser.prog}\n\n{parser.description}\n\n```text\n{usage}\n```\n"
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        if actions:
            yield _table([group.title or "options", "meaning"], [_option(a, formatter) for a in actions]) + "\n"
    from obr.cli.stage_settings import settings_help

    for text in filter(None, (parser.epilog, settings_help(parser.prog.split()[-1]))):
        yield f"```text\n{text}\n```\n"


def cli_page() -> str:
    """Every sub-command with its options: commands for people, then stages of the workflow."""
    from os import environ

    environ["COLUMNS"] = "100"  # the width of usage lines does not depend on the terminal
    parsers = _subcommands()
    from obr.cli.parser import BY_HAND

    parts = [
        "# Command line\n\n`obr COMMAND --help` prints the same. This page is generated from the parser.\n",
        "## Commands\n",
        *[text for name in parsers if name in BY_HAND for text in _command(parsers[name])],
        "## Workflow stages\n\nSnakemake calls these. A printed command runs again as it is.\n",
        *[text for name in parsers if name not in BY_HAND for text in _command(parsers[name])],
    ]
    return "\n".join(parts)


# --- the configuration


def _type(entry: dict) -> str:
    """The type of a value in words."""
    if "$ref" in entry and entry["$ref"] != "#/$defs/named":
        name = entry["$ref"].rpartition("/")[2]
        return "text" if name == "sha256" else f"[{name}](#{name})"
    if "enum" in entry or "const" in entry:
        values = entry.get("enum", [entry.get("const")])
        return ", ".join(dict.fromkeys(map(_value, values)))  # some are also given as text
    if "oneOf" in entry and "type" not in entry:
        return " or ".join(_type(one) for one in entry["oneOf"])
    types = entry.get("type", "object")
    words = {"integer": "whole number", "string": "text", "object": "mapping", "array": "list"}
    text = " or ".join(words.get(name, name) for name in ([types] if isinstance(types, str) else types))
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {entry[key]}" for key, sign in bounds.items() if key in entry]
    return f"{text} {', '.join(limits)}".strip()


def _value(value) -> str:
    """A value as it is written in YAML."""
    return f"`{value if isinstance(value, str) and value.strip() else json.dumps(value)}`"


def _default(name: str, entry: dict) -> str:
    """The default of a key of an entry, or that it is required."""
    below = entry["properties"][name]
    if "default" in below:
        text = _value(below["default"])
        return text if len(text) < SHORT else f"{text[: SHORT - 2]}…`"
    return "required" if name in entry.get("required", []) else ""


def _keys(entry: dict, prefix: str = "") -> Iterator[list[str]]:
    """(key, type, default, description) of every key below an entry, nested ones by their path."""
    for name, below in entry.get("properties", {}).items():
        yield [f"`{prefix}{name}`", _type(below), _default(name, entry), below.get("description", "")]
        yield from _keys(below, f"{prefix}{name}.")
        yield from _keys(below.get("items", {}), f"{prefix}{name}[].")
        for one in below.get("oneOf", []):
            yield from _keys(one, f"{prefix}{name}.")


def _sentence(text: str) -> str:
    """A description as a sentence of its own; one that begins with a value keeps its case."""
    text = text.strip().rstrip(".")
    return f"{text[:1].upper()}{text[1:]}." if text and ":" not in text.split(" ")[0] else text


def _section(name: str, entry: dict) -> Iterator[str]:
    yield f"### {name}\n\n{_sentence(entry.get('description', ''))}\n"
    if "default" in entry and entry["default"] != {}:
        yield f"Type: {_type(entry)}. Default: {_value(entry['default'])}.\n"
    inner = entry.get("additionalProperties")
    named = inner if isinstance(inner, dict) else entry
    if set(named) == {"$ref"}:
        yield f"Entries by name; each is a {_type(named)}.\n"
    for one in [named, named.get("items", {}), *named.get("oneOf", []), *named.get("items", {}).get("oneOf", [])]:
        rows = list(_keys(one))
        if rows:
            yield _table(["key", "type", "default", "meaning"], rows) + "\n"


def config_page() -> str:
    """Every key of the configuration: type, default and description, by section."""
    schema = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    parts = [
        "# Configuration keys\n\nThis page is generated from the schema that checks every run. "
        "[Configuration files](config-files.md) shows where the keys stand and how files combine.\n",
        "## Top-level keys\n",
        *[text for name, entry in schema["properties"].items() for text in _section(name, entry)],
        "## Parts of entries\n\nThe types that the tables above link to.\n",
        *[
            text
            for name, entry in schema["$defs"].items()
            if name not in ("named", "sha256")
            for text in _section(name, entry)
        ],
    ]
    return "\n".join(parts)


# --- the recipes


def recipes_page() -> str:
    """One table for each sheet of recipes, without the columns that are empty in it."""
    parts = [
        "# Recipes\n\nA recipe says how a checkpoint is made. An empty cell is the default of its field; "
        "`obr recipes show NAME` prints all values. [Recipe fields](config.md#recipe) describes the columns. "
        "This page is generated from the sheets in `config/recipes/`.\n"
    ]
    for sheet in sorted(SHEETS.glob("*.tsv")):
        with sheet.open(encoding="utf-8", newline="") as file:
            header, *lines = [line for line in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if line]
        used = [i for i in range(len(header)) if any(line[i].strip() for line in lines)]
        rows = [[f"`{line[i]}`" if i == 0 else line[i] for i in used] for line in lines]
        table = _table([header[i] for i in used], rows)
        parts.append(f'## {sheet.stem}\n\n<div class="sheet" markdown>\n\n{table}\n\n</div>\n')
    return "\n".join(parts)


def families_page() -> str:
    """Every family of models with what works for it, and those that are refused."""
    sys.path.insert(0, str(ROOT / "workflow"))
    from obr.export.gguf import ARCHITECTURES
    from obr.models.architectures import FAMILIES, REFUSED

    rows = []
    for name, layout in sorted(FAMILIES.items()):
        kinds = ", ".join(layout.rotations) or "none"
        if layout.unrotated:
            kinds += f"{'; not the others' if layout.rotations else ''}, since {layout.unrotated}"
        blocks = "mixture of experts" if layout.experts else "fused layers" if layout.fused else "dense"
        keys = "no: a latent vector is cached" if layout.latent else "yes"
        exports = "compressed-tensors" + (", GGUF" if name in ARCHITECTURES else "")
        learned = "yes" if layout.rotations else "no"
        rows.append([f"`{name}`", blocks, kinds, learned, keys, "yes", exports])
    header = ["model_type", "blocks", "rotations", "learned", "keys and values", "packed products", "exports"]
    return "\n".join(
        [
            "# Model families\n\nThis page is generated from the entries of `FAMILIES`. "
            "[Add a model family](../how-to/add-a-model-family.md) describes an entry. "
            "Every family is compressed by every method, streamed or in memory, saved, verified and evaluated; "
            "[experts](../explanation/experts.md#what-is-refused) rule some settings out. "
            "Where a recipe asks for a rotation that a family does not take, the model stays unrotated. The manifest "
            "and the notes below a table say so.\n",
            _table(header, rows),
            "\n## Refused\n",
            _table(["model_type", "reason"], [[f"`{name}`", reason] for name, reason in sorted(REFUSED.items())]),
        ]
    )


def config_files_page() -> str:
    """config/README.md as a page of the site."""
    return (ROOT / "config/README.md").read_text(encoding="utf-8")


GENERATED = {
    "reference/cli.md": cli_page,
    "reference/config.md": config_page,
    "reference/recipes.md": recipes_page,
    "reference/families.md": families_page,
    CONFIG_FILES: config_files_page,
}


# --- links that leave docs/


def _outside(page: str, target: str) -> Path | None:
    """The file of the project that a page links to, if it lies outside docs/."""
    folder = ROOT / "config" if page == CONFIG_FILES else (ROOT / "docs" / page).parent
    path = (folder / target).resolve()
    return None if path.is_relative_to(ROOT / "docs") or not path.is_relative_to(ROOT) else path


def _place(path: Path) -> str:
    """The page of the site that shows a file of the project."""
    relative = path.relative_to(ROOT).as_posix()
    if relative in ("config", "config/README.md"):
        return CONFIG_FILES
    if relative.startswith("docs/"):
        return relative.removeprefix("docs/")
    return f"source/{relative}" if path.suffix in (".svg", ".png") else f"source/{relative}.md"


def _shown(path: Path) -> str:
    """A page with the text of a file."""
    text = path.read_text(encoding="utf-8").rstrip()
    name = path.relative_to(ROOT).as_posix()
    fence = f"~~~~~~ {LANGUAGES.get(path.suffix, 'text')}\n{text}\n~~~~~~"
    return f"---\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n# {name}\n\n{fence}\n"


def on_files(files, config):
    """Add the generated pages and those of the files that pages link to."""
    for name, make in GENERATED.items():
        files.append(File.generated(config, name, content=make()))
    for page in list(files.documentation_pages()):
        for _, target, _ in LINK.findall(page.content_string):
            path = _outside(page.src_uri, target)
            if path and path.is_file() and not files.get_file_from_path(_place(path)):
                text = {"abs_src_path": str(path)} if path.suffix in (".svg", ".png") else {"content": _shown(path)}
                files.append(File.generated(config, _place(path), **text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Lead links that leave docs/ to the pages of the site that show their files."""
    here = page.file.src_uri
    if here in HIDDEN:
        page.meta["hide"] = HIDDEN[here]

    def led(match: re.Match) -> str:
        path = _outside(here, match[2])
        if path is None and here != CONFIG_FILES:
            return match[0]
        place = _place(path or (ROOT / "config" / match[2]).resolve())
        return match[1] + posixpath.relpath(place, posixpath.dirname(here) or ".") + (match[3] or "")

    return LINK.sub(led, markdown)
