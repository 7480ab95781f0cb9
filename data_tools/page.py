"""HTML pages: one file each, offline, readable on a phone, in light and dark mode.

In: titles, tables and numbers. Out: HTML. All text from a data set is escaped, because captions are untrusted.
"""

import html
import math
from collections.abc import Iterable, Sequence

from latte_scale.store import open_store

STYLE = """
:root{color-scheme:light dark;--ink:light-dark(#1c1f23,#e6e6e3);--soft:light-dark(#63686f,#a0a39f);
--ground:light-dark(#fbfaf8,#16181b);--card:light-dark(#fff,#1f2226);--line:light-dark(#dddad3,#34383d);
--bar:light-dark(#2f6f8f,#6fb4d6)}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 4rem;max-width:76rem;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0 0 .2rem}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}p{margin:.2rem 0;color:var(--soft)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .8rem .3rem 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{font-weight:600}
.grid{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr))}
figure{margin:0;padding:.8rem;background:var(--card);border:1px solid var(--line);border-radius:.5rem;min-width:0}
figcaption{font-size:.9rem;overflow-wrap:anywhere}figcaption small{color:var(--soft);display:block}
video{width:100%;border-radius:.3rem;display:block;margin-bottom:.5rem;background:#000}
svg{width:100%;height:auto;display:block}svg rect{fill:var(--bar)}
svg text{fill:var(--soft);font:11px system-ui,sans-serif}svg line{stroke:var(--line)}
"""
WIDTH, HEIGHT, FOOT = 320, 130, 18
NUM_BARS = 32


def page(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """A whole page. `title` and `subtitle` are text, `sections` HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def write_page(out: str, content: str) -> None:
    """Write a page to a path or URL, atomically; creates folders. Raises StoreError with what to do."""
    folder, _, name = out.rpartition("/")
    open_store(folder or ("/" if out.startswith("/") else ".")).write(name, content.encode())


def section(title: str, *parts: str) -> str:
    """A headed part of a page; `parts` are HTML."""
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def histogram(title: str, values: Sequence[float]) -> str:
    """A histogram as a figure; a single bar if there is only one value."""
    low, high = min(values), max(values)
    num_bars = NUM_BARS if high > low else 1
    counts = [0] * num_bars
    for value in values:
        counts[min(num_bars - 1, int((value - low) / (high - low) * num_bars)) if high > low else 0] += 1
    width, most, room = WIDTH / num_bars, max(counts), HEIGHT - FOOT - 12
    bars = ""
    for i, count in enumerate(counts):
        tall, first = room * count / most, low + (high - low) * i / num_bars
        bars += (
            f'<rect x="{i * width + 0.5:.1f}" y="{HEIGHT - FOOT - tall:.1f}" width="{max(1.0, width - 1):.1f}" '
            f'height="{tall:.1f}"><title>{number(first)} and above: {count}</title></rect>'
        )
    axis = (
        f'<line x1="0" x2="{WIDTH}" y1="{HEIGHT - FOOT}" y2="{HEIGHT - FOOT}"/>'
        f'<text x="0" y="{HEIGHT - 4}">{number(low)}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT - 4}" text-anchor="end">{number(high)}</text>'
        f'<text x="{WIDTH}" y="10" text-anchor="end">{most}</text>'
    )
    label = f"{title}: {len(values)} values from {number(low)} to {number(high)}"
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label, quote=True)}">'
        f"{bars}{axis}</svg><figcaption>{html.escape(title)}</figcaption></figure>"
    )


def number(value: float) -> str:
    """A number in short form: three digits, or all digits of a whole one."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"
