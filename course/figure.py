"""Figures of the course: small multiples of curves with bands, as SVG by hand. They need no package and no script, and
scale to a slide and to paper.

    Panel("title", [Line(points, band, colour, label)])   points (x, y), band (x, low, high); y None leaves a gap
    grid(panels, columns) -> the text of one .svg file
"""
import html
import math
from dataclasses import dataclass, field, replace

from report import ticks

W, H, LEFT, RIGHT, TOP, BOTTOM = 300, 210, 46, 12, 30, 34              # of one panel
STYLE = ("text{font:11px sans-serif;fill:#333}.t{font-size:12px;font-weight:bold}.h{font-size:15px;font-weight:bold}"
         ".g{stroke:#e4e4e4}.a{stroke:#999;fill:none}.l{fill:none;stroke-width:1.6;stroke-linejoin:round}")


@dataclass
class Line:
    points: list                       # (x, y)
    band: list = field(default_factory=list)   # (x, low, high)
    colour: str = "#2c6fbb"
    label: str = ""
    dots: bool = False                 # mark the points: few of them, or no order
    dashed: bool = False


@dataclass
class Panel:
    title: str
    lines: list[Line]
    x: str = ""
    y: str = ""
    bottom: float | None = None        # values that the axis ends at; None: what the points span
    top: float | None = None
    log: bool = False                  # both axes in powers of ten; only numbers above 0 have a place
    legend: str = "top"                # top or low: at the right; bottom: low at the left


def number(v: float) -> str:
    return f"{v:.4g}"


def short(v: float) -> str:
    """2000 -> 2000, 20000 -> 20k, 1e8 -> 100M"""
    power = next((p for p in (1e9, 1e6, 1e3) if abs(v) >= max(p, 1e4)), 1.0)
    return f"{v / power:.3g}" + {1e9: "G", 1e6: "M", 1e3: "k", 1.0: ""}[power] if power > 1 else number(v)


def log_ticks(low: float, high: float) -> list[float]:
    """Exponents of the round numbers between 10^low and 10^high: powers of ten; where these are fewer than three, also
    twice and five times them; where those are, all digits.   1.8 .. 3.3 (64 .. 2048) -> of 100, 200, 500, 1000, 2000"""
    tens = range(math.floor(low), math.ceil(high) + 1)
    for digits in ((1,), (1, 2, 5), range(1, 10)):
        found = [x for n in tens for m in digits if low <= (x := n + math.log10(m)) <= high]
        if len(found) >= 3:
            break
    return found


def take_logs(panel: Panel) -> Panel:
    """The same panel with the logarithm of every number."""
    def log(v: float | None) -> float | None:
        return math.log10(v) if v is not None and v > 0 else None

    lines = [replace(line, points=[(log(x), log(y)) for x, y in line.points],
                     band=[tuple(map(log, b)) for b in line.band]) for line in panel.lines]
    return replace(panel, lines=lines, bottom=log(panel.bottom), top=log(panel.top))


def spans(panel: Panel) -> tuple[float, float, float, float]:
    xs = [x for line in panel.lines for x, *_ in [*line.points, *line.band]]
    ys = [y for line in panel.lines for _, *values in [*line.points, *line.band] for y in values if y is not None]
    ys = [y for y in ys if math.isfinite(y)] or [0.0]
    low = min(ys) if panel.bottom is None else panel.bottom
    high = max(ys) if panel.top is None else panel.top
    air = 0.06 * (high - low) or 0.5
    return (min(xs), max(*xs, min(xs) + 1e-9), low - (0 if panel.bottom is not None else air),
            high + (0 if panel.top is not None else air))


def draw(panel: Panel, across: float, down: float) -> str:
    """One panel with its upper left corner at (across, down). What leaves the axis is cut at its edge."""
    panel = take_logs(panel) if panel.log else panel
    x0, x1, y0, y1 = spans(panel)
    marks, name = (log_ticks, lambda v: short(10**v)) if panel.log else (ticks, number)

    def at(x: float, y: float) -> str:
        px = across + LEFT + (x - x0) / (x1 - x0) * (W - LEFT - RIGHT)
        py = down + H - BOTTOM - (min(max(y, y0), y1) - y0) / (y1 - y0) * (H - TOP - BOTTOM)
        return f"{px:.1f},{py:.1f}"

    floor, right = down + H - BOTTOM, across + W - RIGHT
    parts = [f'<text class="t" x="{across + LEFT}" y="{down + 14}">{html.escape(panel.title)}</text>']
    for v in marks(y0, y1):
        py = at(x0, v).split(",")[1]
        parts.append(f'<path class="g" d="M{across + LEFT},{py} H{right}"/><text x="{across + LEFT - 5}" '
                     f'y="{float(py) + 4:.1f}" text-anchor="end">{name(v)}</text>')
    for v in marks(x0, x1):
        px = at(v, y0).split(",")[0]
        parts.append(f'<path class="a" d="M{px},{floor} v4"/><text x="{px}" y="{floor + 16}" text-anchor="middle">'
                     f'{name(v)}</text>')
    parts.append(f'<path class="a" d="M{across + LEFT},{floor} H{right}"/>')
    parts.append(f'<text x="{(across + LEFT + right) / 2}" y="{floor + 29}" text-anchor="middle">'
                 f'{html.escape(panel.x)}</text>' if panel.x else "")
    parts.append(f'<text x="{across + LEFT}" y="{down + 26}">{html.escape(panel.y)}</text>' if panel.y else "")
    legend = [line for line in panel.lines if line.label]
    for k, line in enumerate(legend):
        row, column, anchor = down + 26 + 13 * k, right, "end"
        if panel.legend != "top":
            row = floor - 7 - 13 * (len(legend) - 1 - k)
        if panel.legend == "bottom":
            column, anchor = across + LEFT + 6, "start"
        parts.append(f'<text x="{column}" y="{row}" text-anchor="{anchor}" style="fill:{line.colour}">'
                     f'{html.escape(line.label)}</text>')
    for line in panel.lines:
        if line.band:
            around = [at(x, high) for x, _, high in line.band] + [at(x, low) for x, low, _ in reversed(line.band)]
            parts.append(f'<polygon points="{" ".join(around)}" fill="{line.colour}" opacity="0.18"/>')
    for line in panel.lines:
        pieces: list[list[str]] = [[]]
        for x, y in line.points:
            if y is None or not math.isfinite(y):
                pieces.append([])
            else:
                pieces[-1].append(at(x, y))
        dash = ' stroke-dasharray="4 3"' if line.dashed else ""
        parts += [f'<path class="l" stroke="{line.colour}"{dash} d="M{" L".join(p)}"/>' for p in pieces if p[1:]]
        if line.dots:
            parts += [f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="2.4" fill="{line.colour}"/>'
                      for piece in pieces for p in piece]
    return "".join(parts)


def grid(panels: list[Panel], columns: int = 3, title: str = "") -> str:
    head = 30 if title else 0
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    body = "".join(draw(panel, W * (i % columns), head + H * (i // columns)) for i, panel in enumerate(panels))
    text = f'<text class="h" x="10" y="20">{html.escape(title)}</text>' if title else ""
    size = f'viewBox="0 0 {W * columns} {head + H * rows}" width="{W * columns}" height="{head + H * rows}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>'
            f'<rect width="100%" height="100%" fill="white"/>{text}{body}</svg>\n')
