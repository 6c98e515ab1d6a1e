"""Charts as inline SVG: matplotlib draws them, and the page's style sheet gives them their colours.

A page must not load resources and must follow the reader's light or dark theme, but matplotlib writes fixed colours.
Charts are drawn in placeholder colours, which `draw_svg` replaces by the style sheet's variables (page.css.j2).
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

logging.getLogger("matplotlib").setLevel(logging.WARNING)  # below it reports on its font cache

SERIES_COLOURS = 8  # variables --s0 to --s7 of page.css.j2
THEME_COLOURS = ("other", "right", "wrong", "junk", "ink", "soft", "line", "card")
COLOUR_NAMES = (*(f"s{i}" for i in range(SERIES_COLOURS)), *THEME_COLOURS)
POINTS_PER_INCH = 72  # of SVG in matplotlib; one point is one unit of the view box
MAX_TICKS = 5
TITLE = "title:"  # marks the id of a group that gets a <title>


def colour(name: str) -> str:
    """Placeholder of a variable of the style sheet, for matplotlib."""
    return f"#fe01{COLOUR_NAMES.index(name):02x}"


STYLE: dict[Any, Any] = {  # typed loosely: rc_context wants names as literals
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # names may hold a dollar sign
    "font.size": 9,
    "text.color": colour("ink"),
    "axes.labelcolor": colour("soft"),
    "axes.edgecolor": colour("line"),
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": colour("line"),
    "xtick.color": colour("line"),
    "ytick.color": colour("line"),
    "xtick.labelcolor": colour("soft"),
    "ytick.labelcolor": colour("soft"),
    **{f"axes.spines.{side}": False for side in ("top", "right", "left")},
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}


def format_number(value: float) -> str:
    """Format a number: four significant digits, thousands grouped, an exponent only for extreme values."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e9):
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def draw_svg(description: str, width: float, height: float, paint: Callable[[Figure], None]) -> Markup:
    """Draw a figure as one ``<svg>`` element without external resources.

    Args:
        description: for screen readers.
        width: of the view box; the style sheet scales the drawing to its column.
        height: of the view box.
        paint: draws on an empty figure, in colours of `colour`.
    """
    written = io.BytesIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": description}):
        figure = Figure((width / POINTS_PER_INCH, height / POINTS_PER_INCH), layout="constrained")
        paint(figure)
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(written.getvalue())
    root.remove(root[0])  # the metadata
    used = set(re.findall(r"#(\w+)", " ".join(value for element in root.iter() for value in element.attrib.values())))
    for element in list(root.iter()):
        _adapt(element, used)
    root.attrib |= {"role": "img", "aria-label": description}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _adapt(element: ElementTree.Element, used: set[str]) -> None:
    """Make an element fit for a page: no namespaces, only ids that are ``used``, titles, the theme's colours."""
    element.tag = element.tag.rpartition("}")[2]
    attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    identity = attributes.pop("id", "")
    if identity.startswith(TITLE):
        title = ElementTree.Element("title")
        title.text = identity.removeprefix(TITLE)
        element.insert(0, title)
    elif identity in used:
        attributes["id"] = identity
    if "style" in attributes:
        attributes["style"] = re.sub(
            r"#fe01(\w\w)", lambda found: f"var(--{COLOUR_NAMES[int(found[1], 16)]})", attributes["style"]
        )
    element.attrib.clear()
    element.attrib |= attributes


def set_title(artist: Artist, words: str) -> None:
    """Give an artist words that a pointer or a screen reader finds."""
    artist.set_gid(TITLE + words)


def number_axes(axes: Axes, *names: str) -> None:
    """Round tick values, written by `format_number`, on the axes "x" and "y"."""
    for name in names:
        axis = axes.xaxis if name == "x" else axes.yaxis
        axis.set_major_locator(MaxNLocator(MAX_TICKS, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))


def finite_or_nan(value: float | None) -> float:
    """The value, or NaN, which leaves a gap in a line, where it is missing or not finite."""
    return value if value is not None and math.isfinite(value) else math.nan
