"""What the documents name exists: files and headings that links lead to, and targets of make."""

import re
from pathlib import Path

import pytest

from helpers.paths import ROOT

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "config/*.md", "docs/**/*.md", "tests/fixtures/*.md", "workflow/published/*.md")
    for path in ROOT.glob(pattern)
)
# Pages of the site alone, which test_site builds.
GENERATED = {f"docs/reference/{name}.md" for name in ("cli", "config", "config-files", "recipes")}


def text_of(path: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", text_of(path), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings(document):
    folder = (ROOT / document).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(ROOT / document)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = folder / name if name else ROOT / document
        if target.resolve().is_relative_to(ROOT) and target.resolve().relative_to(ROOT).as_posix() in GENERATED:
            continue
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_targets_of_make_exist(document):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"`make ([a-z-]+)`", text)
    named += [
        name
        for block in re.findall(r"```sh\n(.*?)```", text, re.S)
        for name in re.findall(r"^make (\S+)", block, re.M)
    ]
    assert set(named) <= set(targets)
