"""Pages that need no other file: style, tables, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 1.8em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; } td, th { padding: .2em .9em .2em 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.note { background: #fff4d6; border-left: 4px solid #e0a030; padding: .6em 1em; margin: 1em 0; }
.bad { background: #fbe3e3; border-left: 4px solid #c63a3a; padding: .6em 1em; white-space: pre-wrap; }
.ERROR { color: #b02020; } .WARN { color: #a06800; } img { max-width: 100%; } small { color: #666; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page around parts of HTML."""
    body = "\n".join(parts)
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def image(data: bytes, alt: str, kind: str = "png") -> str:
    """A picture inside the page; `kind` is png or jpeg."""
    text = base64.b64encode(data).decode("ascii")
    return f"<img alt='{escape(alt)}' src='data:image/{kind};base64,{text}'>"


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """A table; numbers behind the first column are aligned to the right."""
    lines = ["<table>"]
    if head:
        lines.append("<tr>" + "".join(f"<th{_kind(h, i)}>{escape(h)}</th>" for i, h in enumerate(head)) + "</tr>")
    for row in rows:
        lines.append("<tr>" + "".join(f"<td{_kind(v, i)}>{escape(str(v))}</td>" for i, v in enumerate(row)) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _kind(value: Any, column: int) -> str:
    if value in ("ERROR", "WARN"):
        return f" class='{value}'"
    return " class='n'" if column and isinstance(value, int | float) else ""
