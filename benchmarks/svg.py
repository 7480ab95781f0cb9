"""A line chart as an SVG file for any background, for studies and score curves."""

import html
import math

COLOURS = ("#2f6fde", "#d9622b", "#2e9e6b", "#8a4fbf", "#b58900", "#c2347b")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 240, 56, 10, 14, 28
STYLE = "<style>text{font:11px sans-serif;fill:#777}</style>"


def line_chart(title: str, series: dict[str, list[tuple[float, float]]], log_y: bool = False) -> str:
    """Series by name as (x, y) points, with a legend. Points that a log axis has no place for are left out.

    At most as many series as there are colours. Raises ValueError without a point.
    """
    drawn = {name: [(x, y) for x, y in line if not log_y or y > 0] for name, line in series.items()}
    points = [point for line in drawn.values() for point in line]
    if not points or len(drawn) > len(COLOURS):
        raise ValueError(f"{title}: expected 1 to {len(COLOURS)} series with points, got {len(drawn)}")
    ys = [math.log10(y) if log_y else y for _, y in points]
    x0, y0 = min(x for x, _ in points), min(ys) if log_y else min(0.0, *ys)
    x1, y1 = max(x0 + 1, *(x for x, _ in points)), max(y0 + 1e-9, *ys)

    def place(x: float, y: float) -> tuple[float, float]:
        """Pixels of a point whose y is already on the axis' scale."""
        across, down = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - down * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" xmlns="http://www.w3.org/2000/svg" '
        f'aria-label="{html.escape(title)}">{STYLE}'
    ]
    for i in range(5):
        x, y = x0 + (x1 - x0) * i / 4, y0 + (y1 - y0) * i / 4
        px, py = place(x, y)
        label = f"{10**y if log_y else y:.3g}"
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}" stroke="#8884"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{label}</text>')
        parts.append(f'<text x="{px:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{x:.0f}</text>')
    for i, (colour, (name, line)) in enumerate(zip(COLOURS, drawn.items(), strict=False)):
        path = " ".join("{:.1f},{:.1f}".format(*place(x, math.log10(y) if log_y else y)) for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        parts.append(f'<text x="300" y="{30 + 14 * i}" style="fill:{colour}">{html.escape(name)}</text>')
    return "".join([*parts, "</svg>\n"])
