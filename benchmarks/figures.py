"""The tables and pictures of docs/performance.md, made of docs/performance/figures.json.

python -m benchmarks.figures

A table stands in the page behind its name in a comment, `<!-- table: training -->`. A picture is
the column of a table as bars, with the spread that a cell tells in parentheses as a line, such as
"8.1 x (7.7-8.5)".
"""

import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
FOLDER = PAGE.with_suffix("")
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n\n)(?:\|.*\n)*")
_VALUE = re.compile(r"([\d.,]+)[^(]*(?:\(([\d.]+)-([\d.]+)\))?")

_LABELS, _BARS, _ROW = 290, 500, 24  # widths and heights in pixels
_STYLE = """\
    svg { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
    text { fill: #1f2328; font-size: 12px; }
    .title { font-size: 14px; font-weight: 600; }
    .label { text-anchor: end; }
    .paper { fill: #ffffff; }
    .bar { fill: #0969da; }
    .transformers { fill: #8c959f; }
    .line { stroke: #1f2328; stroke-width: 1.5; }
    .one { stroke: #8c959f; stroke-dasharray: 3 3; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3; }
      .paper { fill: #0d1117; }
      .bar { fill: #1f6feb; }
      .transformers { fill: #6e7681; }
      .line { stroke: #e6edf3; }
    }"""


def main() -> None:
    """Write the page's tables and its pictures anew."""
    figures = json.loads((FOLDER / "figures.json").read_text(encoding="utf-8"))
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")
    for name in figures["pictures"]:
        (FOLDER / f"{name}.svg").write_text(picture(name, figures), encoding="utf-8")


def with_tables(page: str, figures: Mapping[str, Any]) -> str:
    """`page` with each table that it names as `figures` has it."""

    def table(match: re.Match[str]) -> str:
        head, rows = (figures["tables"][match[2]][part] for part in ("head", "rows"))
        lines = [head, ["---"] * len(head), *rows]
        return match[1] + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)

    return _TABLE.sub(table, page)


def picture(name: str, figures: Mapping[str, Any]) -> str:
    """One picture, as SVG: a bar for each row of its table, the number behind it."""
    chosen = figures["pictures"][name]
    rows = figures["tables"][chosen["table"]]["rows"]
    bars = [
        (", ".join(row[i] for i in chosen["labels"]), _parsed(row[chosen["value"]])) for row in rows
    ]
    longest = max(high for _, (_, _, _, high) in bars)
    height = 40 + _ROW * len(bars)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {height}" role="img">',
        f"  <title>{escape(chosen['title'])}</title>",
        f"  <style>\n{_STYLE}\n  </style>",
        f'  <rect class="paper" width="900" height="{height}"/>',
        f'  <text class="title" x="12" y="22">{escape(chosen["title"])}</text>',
    ]
    for i, (label, (shown, *ends)) in enumerate(bars):
        low, value, high = (_LABELS + _BARS * end / longest for end in ends)
        lines += _bar(36 + _ROW * i, label, low, value, high)
        lines.append(f'  <text x="{high + 8:.1f}" y="{52 + _ROW * i}">{shown}</text>')
    if all(low < high for _, (_, low, _, high) in bars):  # ratios
        x = _LABELS + _BARS / longest
        lines.append(f'  <path class="one" d="M{x:.1f},34 V{height - 6}"/>')
    return "\n".join([*lines, "</svg>", ""])


def _bar(y: int, label: str, low: float, value: float, high: float) -> list[str]:
    kind = "transformers" if label.startswith("transformers") and low == high else "bar"
    lines = [
        f'  <text class="label" x="{_LABELS - 8}" y="{y + 16}">{escape(label)}</text>',
        f'  <rect class="{kind}" x="{_LABELS}" y="{y + 3}" width="{value - _LABELS:.1f}" '
        f'height="{_ROW - 7}" rx="2"/>',
    ]
    if low < high:
        lines.append(f'  <path class="line" d="M{low:.1f},{y + 11.5} H{high:.1f}"/>')
    return lines


def _parsed(cell: str) -> tuple[str, float, float, float]:
    """The number that a cell begins with, as it is written; the least, the median, the largest."""
    found = _VALUE.match(cell)
    assert found, cell
    value = float(found[1].replace(",", ""))
    return found[1], float(found[2] or value), value, float(found[3] or value)


if __name__ == "__main__":
    main()
