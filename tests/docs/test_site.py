"""The documentation site: its strict build without a network, its links, its generated pages, and derived numbers."""

import csv
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from helpers.paths import ROOT
from obr.cli.parser import BY_HAND, STAGES
from obr.models.architectures import FAMILIES, REFUSED

DENSE = 26.98  # perplexity of the dense model in docs/results/joint.md
PAGES = sorted((ROOT / "docs").rglob("*.md"))


class Page(HTMLParser):
    """The ids, links and loaded files of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag in ("script", "img", "iframe") and found.get("src"):
            self.loaded.append(found["src"])
        elif tag == "link" and found.get("rel") != "canonical":
            self.loaded.append(found["href"])
        elif tag == "a" and found.get("href"):
            self.links.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. Every connection goes to a port where nobody listens."""
    folder = tmp_path_factory.mktemp("site")
    nobody = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ | nobody | {"NO_MKDOCS_2_WARNING": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name Python functions."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def nav_pages() -> list[str]:
    """The pages of the navigation."""
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)

    def below(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [name for part in (entry.values() if isinstance(entry, dict) else entry) for name in below(part)]

    return below(config["nav"])


@pytest.mark.slow
def test_every_page_of_the_navigation_is_built(site):
    names = nav_pages()
    assert len(names) == len(set(names)) > 30
    assert {path.relative_to(ROOT / "docs").as_posix() for path in PAGES} <= set(names)
    for name in names:
        assert (site / name).with_suffix(".html").is_file(), name


@pytest.mark.slow
def test_links_and_anchors_of_the_site_resolve(site, pages):
    followed = 0
    for path, page in pages.items():
        if path.name == "404.html":  # its links are absolute
            continue
        for link in page.links + page.loaded:
            name, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            target = (path.parent / unquote(name)).resolve() if name else path
            assert target.exists(), f"{path.relative_to(site)}: {link}"
            followed += 1
            if anchor and target in pages:
                assert unquote(anchor) in pages[target].ids, f"{path.relative_to(site)}: {link}"
    assert followed > 1000


@pytest.mark.slow
def test_pages_load_nothing_from_other_hosts(pages):
    for path, page in pages.items():
        assert not [link for link in page.loaded if re.match(r"(https?:)?//", link)], path


@pytest.mark.slow
def test_generated_pages_name_every_command_key_family_and_recipe(site, pages):
    commands = pages[site / "reference/cli.html"].ids
    assert {f"obr-{name}" for name in [*BY_HAND, *STAGES]} <= commands
    schema = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text(encoding="utf-8"))
    assert set(schema["properties"]) <= pages[site / "reference/config.html"].ids
    families = (site / "reference/families.html").read_text(encoding="utf-8")
    missing = [name for name in (*FAMILIES, *REFUSED) if f"<code>{name}</code>" not in families]
    assert missing == []
    text = (site / "reference/recipes.html").read_text(encoding="utf-8")
    for sheet in (ROOT / "config/recipes").glob("*.tsv"):
        with sheet.open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                assert f"<code>{line['recipe']}</code>" in text, line["recipe"]


@pytest.mark.slow
def test_python_api_has_every_exported_name(site):
    import obr

    text = (site / "reference/python-api.html").read_text(encoding="utf-8")
    for name in obr.__all__:
        assert f"obr.{name}" in text, name


def tables(path: Path) -> list[list[list[str]]]:
    """The tables of a page as cells, without their lines of dashes."""
    found = re.findall(r"(?:^\|.*\n)+", path.read_text(encoding="utf-8"), re.M)
    lines = [[line.strip("|\n ").split(" | ") for line in table.splitlines()] for table in found]
    return [[[cell.strip(" *`|") for cell in line] for i, line in enumerate(table) if i != 1] for table in lines]


def number(cell: str) -> float | None:
    return float(cell.replace(",", "")) if re.fullmatch(r"[\d,.]+", cell) else None


def test_distances_to_dense_follow_from_the_perplexities():
    checked = 0
    for header, *rows in tables(ROOT / "docs/results/joint.md"):
        columns = [i for i, name in enumerate(header) if name == "distance"]
        first = next((row for row in rows if row[0] == "OBR_GPTQ"), None)
        reference = 0.0
        for column in columns:
            if first[column] == "1.00":
                reference = number(first[column - 1])
            for row in rows:
                value, distance = number(row[column - 1]), number(row[column])
                assert (value is None) == (distance is None), row
                single = header[column + 1 : column + 2] == ["seeds"] and len(row) == column + 1
                compared = number(first[column + 1].split(", ")[0]) if single else reference
                if value is not None:
                    assert f"{(value - DENSE) / (compared - DENSE):.2f}" == f"{distance:.2f}", row
                    checked += 1
    assert checked > 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT / "docs").as_posix())
def test_lists_and_tables_follow_a_blank_line(page):
    """Markdown's own parser, unlike GitHub's, needs one."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    item = re.compile(r"(\s*[*-] |\s*\d+\. |\|)")
    for before, line in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        if item.match(line) and before.strip() and not item.match(before):
            assert before.startswith(" "), line  # the end of an item
