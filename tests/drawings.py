"""Charts read back from their SVG."""

from __future__ import annotations

import re
from xml.etree import ElementTree


def titled_groups(drawing: str) -> dict[str, ElementTree.Element]:
    """The groups of a drawing that have a title, by it; of several with one title the last."""
    root = ElementTree.fromstring(drawing)
    return {title.text or "": group for group in root.iter("g") for title in group.findall("title")}


def theme_colours(group: ElementTree.Element) -> set[str]:
    """Variables of the style sheet that colour what is drawn in a group, apart from the card's."""
    styles = " ".join(element.get("style", "") for element in group.iter())
    return set(re.findall(r"var\(--(\w+)\)", styles)) - {"card"}


def marks(drawing: str) -> dict[str, int]:
    """Marks of all groups of one title, by title."""
    found: dict[str, int] = {}
    for group in ElementTree.fromstring(drawing).iter("g"):
        for title in group.findall("title"):
            count = len(list(group.iter("use")))
            found[title.text or ""] = found.get(title.text or "", 0) + count
    return found
