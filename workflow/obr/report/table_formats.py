"""Tables as they are printed: rounded, the best compressed value in bold, in Markdown, HTML and LaTeX."""

from dataclasses import dataclass, field
from html import escape
from itertools import groupby

import pandas as pd

from obr.report.table_rows import Metric

EMPTY = "–"
ROW_HEADS = ("Model", "Method", "Bits", "Sparsity")
PANEL_COLUMNS = 9  # more than this beside the row heads is too small to read across a page


@dataclass
class Table:
    """A table as numbers, with what is needed to print it.

    frame: one row per (model, recipe); scores in percent, perplexities as they are; NaN where there is none.
    """

    frame: pd.DataFrame
    notes: list[str]
    title: str = ""
    metrics: list[Metric] = field(default_factory=list)
    details: list[str] = field(default_factory=list)


@dataclass
class Column:
    """A printed column; `group` is the heading it shares with its neighbours, '' for none."""

    group: str
    heading: str
    cells: list[str]
    bold: list[bool] | None = None
    left: bool = False


def detail_columns(detail: str) -> list[str]:
    """The columns of a table's frame that hold a detail."""
    if detail == "bits_per_weight":
        return ["bits_per_weight_theoretical", "bits_per_weight_file"]
    return ["sparsity_measured"] if detail == "sparsity" else [detail]


def _columns(table: Table) -> list[Column]:
    """What is printed, left to right; columns without a single value are left out."""
    frame = table.frame
    repeated = frame["model"].duplicated()
    columns = [
        Column("", "Model", ["" if again else m for again, m in zip(repeated, frame["model_label"])], left=True),
        Column("", "Method", list(frame["label"]), left=True),
        Column("", "Bits", list(frame["setting"]), left=True),
        Column("", "Sparsity", [_asked_sparsity(s) for s in frame["sparsity"]]),
    ]
    for metric in table.metrics:
        columns += _metric_columns(frame, metric)
    columns += [_detail_column(frame, detail) for detail in table.details]
    return [c for c in columns if any(cell not in ("", EMPTY) for cell in c.cells)]


def _asked_sparsity(sparsity: float | str) -> str:
    if isinstance(sparsity, str):
        return sparsity
    return f"{100 * sparsity:g}%" if sparsity else EMPTY


def _metric_columns(frame: pd.DataFrame, metric: Metric) -> list[Column]:
    """Ours alone, or paper, ours and delta where anything is published."""
    key, heading = metric.key, f"{metric.heading} {'↓' if metric.lower_is_better else '↑'}"
    errors = frame.get(f"{key}_stderr", pd.Series(float("nan"), index=frame.index))
    empty = EMPTY if metric.kind in ("minutes", "quoted") else _score(float("nan"))
    absent = frame["method"] == ""  # rows that only quote
    cells = [
        (EMPTY if gone else empty) if pd.isna(v) else _score(v) + (f" ± {e:.2f}" if pd.notna(e) else "")
        for v, e, gone in zip(frame[f"{key}_ours"], errors, absent)
    ]
    ours = Column("", heading, cells, _best(frame, f"{key}_ours", metric))
    if frame[f"{key}_paper"].isna().all():
        return [ours]
    if metric.kind == "quoted":
        printed = [EMPTY if pd.isna(v) else _score(v) for v in frame[f"{key}_paper"]]
        return [Column(heading, "paper", printed, _best(frame, f"{key}_paper", metric))]
    ours.group, ours.heading = heading, "ours"
    paper = [EMPTY if pd.isna(v) else _score(v) for v in frame[f"{key}_paper"]]
    delta = [EMPTY if pd.isna(v) else f"{v:+.2f}".replace("-", "−") for v in frame[f"{key}_delta"]]
    best = _best(frame, f"{key}_paper", metric)
    return [Column(heading, "paper", paper, best), ours, Column(heading, "Δ", delta)]


def _score(value: float) -> str:
    return f"{value:.2f}" if not abs(value) >= 1e5 else f"{value:.1e}"


def _best(frame: pd.DataFrame, column: str, metric: Metric) -> list[bool]:
    """The best compressed recipe of each model; none where there is nothing to compare with."""
    values = frame[column].where(frame["method"] != "dense").round(2)
    groups = values.groupby(frame["model"])
    best = groups.transform("min" if metric.lower_is_better else "max")
    return list((values == best) & (groups.transform("count") > 1))


def _detail_column(frame: pd.DataFrame, detail: str) -> Column:
    formats = {
        "bits_per_weight": ("Bits per weight", "{:.2f}"),
        "file_mb": ("File (MB)", "{:,.1f}"),
        "seconds": ("Time (s)", "{:,.0f}"),
        "refinement_seconds": ("Refinement (s)", "{:,.0f}"),
        "relative_error": ("Relative error", "{:.4f}"),
        "held_out_error": ("Held-out error", "{:.4f}"),
        "sparsity": ("Zeros (%)", "{:.2f}"),
    }
    heading, style = formats[detail]
    scale = 100 if detail == "sparsity" else 1
    parts = [[EMPTY if pd.isna(v) else style.format(scale * v) for v in frame[c]] for c in detail_columns(detail)]
    return Column("", heading, [EMPTY if set(cell) == {EMPTY} else " / ".join(cell) for cell in zip(*parts)])


def markdown(table: Table) -> str:
    """The table and its notes as Markdown."""
    columns = _columns(table)
    headings = [f"{c.group} {c.heading}".strip() for c in columns]
    lines = [headings, [":--" if c.left else "--:" for c in columns]]
    for i in range(len(table.frame)):
        cells = [c.cells[i].replace("|", "\\|") for c in columns]
        lines.append([f"**{cell}**" if c.bold and c.bold[i] else cell for c, cell in zip(columns, cells)])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "\n".join(f"- {note}" for note in table.notes)
    title = f"**{table.title}**\n\n" if table.title else ""
    return f"{title}{body}\n\n{notes}\n"


STYLE = """
body { font: 13px/1.5 system-ui, sans-serif; color: #222; margin: 1.5em; }
table { border-collapse: collapse; border-top: 2px solid; border-bottom: 2px solid; }
caption { text-align: left; font-weight: 600; font-size: 16px; padding-bottom: .6em; }
th, td { padding: .2em .45em; text-align: right; white-space: nowrap; font-weight: normal; }
.left { text-align: left; } thead th { font-weight: 600; } .first td { border-top: 1px solid #999; }
.span { border-bottom: 1px solid #999; text-align: center; } .best { font-weight: 700; } .paper { color: #777; }
div { overflow-x: auto; } ul { max-width: 70em; color: #444; font-size: 13px; padding-left: 1.2em; }
"""


def html(table: Table) -> str:
    """The table and its notes as a page of its own, for the report."""
    columns, models = _columns(table), list(table.frame["model"])
    rows = []
    for i, model in enumerate(models):
        cells = [_html_cell(c, c.cells[i], bool(c.bold and c.bold[i])) for c in columns]
        first = ' class="first"' if i == 0 or model != models[i - 1] else ""
        rows.append(f"<tr{first}>{''.join(cells)}</tr>")
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return (
        f'<!doctype html><meta charset="utf-8"><title>{escape(table.title)}</title><style>{STYLE}</style>'
        f"<div><table><caption>{escape(table.title)}</caption><thead>{_html_head(columns)}</thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div><ul>{notes}</ul>\n"
    )


def _html_cell(column: Column, text: str, best: bool) -> str:
    kinds = [("left", column.left), ("best", best), ("paper", column.heading == "paper")]
    names = " ".join(name for name, given in kinds if given)
    return f"<td{f' class={chr(34)}{names}{chr(34)}' if names else ''}>{escape(text)}</td>"


def _html_head(columns: list[Column]) -> str:
    """One heading line, or two where metrics have sub-columns."""
    below = "".join(f'<th class="{"left" if c.left else ""}">{escape(c.heading)}</th>' for c in columns)
    if not any(c.group for c in columns):
        return f"<tr>{below}</tr>"
    above = ""
    for name, group in groupby(columns, key=lambda c: c.group):
        above += f'<th colspan="{len(list(group))}"{" class=span" if name else ""}>{escape(name)}</th>'
    return f"<tr>{above}</tr><tr>{below}</tr>"


def latex(table: Table, name: str) -> str:
    """A whole table environment, labelled tab:name; it needs the packages booktabs and graphicx."""
    columns = _columns(table)
    models = list(table.frame["model"])
    panels = "\n  \\par\\medskip\n".join(_latex_panel(panel, models) for panel in _panels(columns))
    notes = "\n".join(f"  {escape_latex(note)}" for note in table.notes)
    return rf"""% Needs \usepackage{{booktabs,graphicx}}.
\begin{{table}}[tp]
  \centering
  \caption{{{escape_latex(table.title)}}}
  \label{{tab:{name}}}
{panels}
  \par\smallskip\raggedright\scriptsize
{notes}
\end{{table}}
"""


def _panels(columns: list[Column]) -> list[list[Column]]:
    """The columns cut into stacked parts that stay readable on a page; each repeats the heads of its rows."""
    heads = [c for c in columns if c.heading in ROW_HEADS]
    panels, places = [], 0
    for _, group in groupby(columns[len(heads) :], key=lambda c: c.group or id(c)):
        group = list(group)
        if not panels or places + len(group) > PANEL_COLUMNS:
            panels, places = [*panels, list(heads)], 0
        panels[-1] += group
        places += len(group)
    return panels or [heads]


def _latex_panel(columns: list[Column], models: list[str]) -> str:
    body = []
    for i, model in enumerate(models):
        if i and model != models[i - 1]:
            body.append(r"\midrule")
        cells = [(c, escape_latex(c.cells[i])) for c in columns]
        bold = [rf"\textbf{{{cell}}}" if c.bold and c.bold[i] else cell for c, cell in cells]
        body.append(" & ".join(bold) + r" \\")
    indented = "\n".join(f"    {line}" for line in [*_latex_head(columns), r"\midrule", *body])
    return rf"""  \resizebox{{\ifdim\width>\linewidth\linewidth\else\width\fi}}{{!}}{{%
  \begin{{tabular}}{{{"".join("l" if c.left else "r" for c in columns)}}}
    \toprule
{indented}
    \bottomrule
  \end{{tabular}}}}"""


def _latex_head(columns: list[Column]) -> list[str]:
    """One heading line, or two with rules where metrics have sub-columns."""
    headings = " & ".join(escape_latex(c.heading) for c in columns) + r" \\"
    spans, rules, stop = [], [], 0
    for name, group in groupby(columns, key=lambda c: c.group):
        start, width = stop + 1, len(list(group))
        stop += width
        if name:
            spans.append(rf"\multicolumn{{{width}}}{{c}}{{{escape_latex(name)}}}")
            rules.append(rf"\cmidrule(lr){{{start}-{stop}}}")
        else:
            spans += [""] * width
    return [" & ".join(spans) + r" \\", " ".join(rules), headings] if rules else [headings]


def escape_latex(text: str) -> str:
    """`text` with LaTeX's special characters, and the signs that tables use, as commands."""
    commands = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "−": r"$-$",
        "Δ": r"$\Delta$",
        "α": r"$\alpha$",
        "↓": r"$\downarrow$",
        "↑": r"$\uparrow$",
        "–": "--",
        "…": r"\ldots{}",
        "⁶": r"$^6$",
    }
    return "".join(commands.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
