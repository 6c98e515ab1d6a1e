"""Two drawings of a verdict as inline SVG: differences with their intervals, and similarities of certain pairs.

Written by hand for the reasons that `curves` gives; colours are classes of the page's style sheet. In both the
candidate and one person are s0, the active model and two persons s1.

Letters: F figures, P positive and M negative pairs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from markupsafe import Markup

from resight.training.curves import number, ticks
from resight.training.neighbours import Floats
from resight.training.separation import Estimate

WIDTH, NAMES, EDGE = 680, 215, 14  # viewBox units; room for the figures' names, and at the right
ROW, HEAD, FOOT = 22, 8, 30  # height of a line, above the first and below the last
PANEL, BINS = 120, 40  # height of a histogram; bins between the least and the most similar pair
GAP = 46  # between the histograms: the axis labels of the upper one


def draw_forest(changes: Mapping[str, Estimate]) -> str:
    """A line for each figure: candidate minus active model with its interval, beside a rule at no change.

    Args:
        changes: F differences, one or more.
    """
    assert changes, "a forest plot needs a difference"
    ends = [value for one in changes.values() for value in (one.low, one.high, 0.0)]
    marks = ticks(min(ends), max(ends))
    if len(marks) == 2 and marks[0] == 0 == min(ends):  # one that changed nothing would lie on the edge
        marks = [-marks[1], *marks]
    height = HEAD + ROW * len(changes) + FOOT
    bottom = height - FOOT

    def x(value: float) -> float:
        return NAMES + (WIDTH - NAMES - EDGE) * (value - marks[0]) / (marks[-1] - marks[0])

    parts = [_open(height, f"Differences of {len(changes)} figures with their intervals")]
    for mark in marks:
        rule = Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>')
        parts.append(rule.format("grid" if mark else "stage", x(mark), x(mark), HEAD, bottom))
        parts.append(_text(x(mark), bottom + 13, number(mark), "middle"))
    parts.append(_text((NAMES + WIDTH - EDGE) / 2, bottom + 26, "candidate minus active model", "middle"))
    for line, (name, change) in enumerate(changes.items()):
        y = HEAD + ROW * (line + 0.5)
        colour = "wrong" if change.high < 0 else "right" if change.low > 0 else "none"
        words = f"{name}: {change.value:+.4f}, {change.low:+.4f} to {change.high:+.4f}"
        parts.append(_text(NAMES - 10, y + 4, name, "end"))
        bar = Markup('<polyline class="{}" points="{:.1f},{:.1f} {:.1f},{:.1f}"/>')
        parts.append(bar.format(colour, x(change.low), y, x(change.high), y))
        dot = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="4"><title>{}</title></circle>')
        parts.append(dot.format(colour, x(change.value), y, words))
    return _close(parts)


def draw_similarities(models: Mapping[str, tuple[Floats, Floats]]) -> str:
    """A panel for each model: how similar pairs of one person and pairs of two are, on one axis for all.

    Args:
        models: name -> float32 (P,) of pairs of one track and (M,) of pairs that are certainly two persons, both of
            one or more.
    """
    every = np.concatenate([values for pair in models.values() for values in pair])
    marks = ticks(float(every.min()), float(every.max()))
    edges = np.linspace(marks[0], marks[-1], BINS + 1)
    height = HEAD + len(models) * (PANEL + GAP)

    def x(value: float) -> float:
        return EDGE + (WIDTH - 2 * EDGE) * (value - marks[0]) / (marks[-1] - marks[0])

    parts = [_open(height, f"Similarities of certain pairs for {' and '.join(models)}")]
    for index, (name, pair) in enumerate(models.items()):
        base = HEAD + index * (PANEL + GAP) + PANEL
        line = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')
        parts.append(line.format(EDGE, WIDTH - EDGE, base, base))
        parts += [_text(x(mark), base + 13, number(mark), "middle") for mark in marks]
        parts.append(_text(WIDTH / 2, base + 27, f"{name}: cosine similarity", "middle"))
        shares = [np.histogram(values, edges)[0] / len(values) for values in pair]
        top = max(share.max() for share in shares)
        for share, colour, kind in zip(shares, ("s0", "s1"), ("one track", "certainly two persons"), strict=True):
            xs, ys = np.repeat(edges, 2)[1:-1], np.repeat(share / top, 2)
            points = " ".join(f"{x(a):.1f},{base - (PANEL - 6) * b:.1f}" for a, b in zip(xs, ys, strict=True))
            steps = Markup('<polyline class="{}" points="{}"><title>{}</title></polyline>')
            parts.append(steps.format(colour, points, f"{name}, pairs of {kind}"))
    return _close(parts)


def _open(height: float, words: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, words)


def _close(parts: list[Markup]) -> str:
    return str(Markup("").join([*parts, Markup("</svg>")]))


def _text(x: float, y: float, words: str, anchor: str) -> Markup:
    text = Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    return text.format(x, y, anchor, words)
