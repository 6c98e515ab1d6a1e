"""One self-contained HTML page of simulated nights: what the cycle decided, and what search was worth each time."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import av
from PIL import Image

from resight.files import write_atomic
from resight.training.report.page import data_uri, format_duration, templates

FRAME_QUALITY = 80  # of JPEG


@dataclass(frozen=True)
class DemoStep:
    """A night, or what an operator did between two.

    Attributes:
        name: of the step.
        what: was there to see.
        state: the cycle's word for how it ended.
        reason: why.
        first: mAP in percent of the first model on this step's queries.
        before: of the model that was active before the step.
        after: of the one that is active after it.
        active: that model's name.
        entries: of the collection that the cycle keeps up.
        searches: that live callers got answers to meanwhile.
        failed: those they got none to.
        seconds: what took how long.
        link: the cycle's own page of the run, relative to this page; empty = none.
        pictures: camera -> JPEG.
    """

    name: str
    what: str
    state: str
    reason: str
    first: float
    before: float
    after: float
    active: str
    entries: int
    searches: int
    failed: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    link: str = ""
    pictures: Mapping[str, bytes] = field(default_factory=dict, repr=False)


def write_nights_page(
    path: Path, *, title: str, summary: str, steps: Sequence[DemoStep], promises: Sequence[tuple[str, bool]]
) -> None:
    """Write the page, replacing it in one step.

    Args:
        path: of the page.
        title: of the page.
        summary: a sentence or two under it.
        steps: in the order they happened.
        promises: what the nights were to show, and whether they did.

    Raises:
        OSError: the folder cannot be written.
    """
    environment = templates(Path(__file__).parent)
    environment.filters |= {"uri": data_uri, "duration": format_duration}
    page = environment.get_template("nights_page.html.j2").render(
        title=title, summary=summary, steps=steps, promises=promises
    )
    write_atomic(path, page.encode())


def extract_frame(video: Path, number: int) -> bytes:
    """One frame of a film, counted from 0, as JPEG; the last one of a shorter film."""
    buffer = io.BytesIO()
    with av.open(str(video)) as container:
        picture: Image.Image | None = None
        for count, frame in enumerate(container.decode(video=0)):
            picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
            if count == number:
                break
    assert picture is not None, f"{video} has no frame"
    picture.save(buffer, "JPEG", quality=FRAME_QUALITY)
    return buffer.getvalue()
