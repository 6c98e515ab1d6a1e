"""A self-contained HTML report of simulated nights: decisions of the cycle and search quality after each night."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import av
from PIL import Image

from resight.files import write_atomic
from resight.training.report.page import data_uri, format_duration, templates

FRAME_QUALITY = 80  # JPEG quality


@dataclass(frozen=True)
class DemoStep:
    """A night, or an operator action between two nights.

    Attributes:
        name: name of the step.
        what: description of the step; like all fields but pictures, a key of the demo's JSON output.
        state: final state reported by the cycle.
        reason: reason of that state.
        first: mAP in percent of the first model on this step's queries.
        before: mAP of the model that was active before the step.
        after: mAP of the model that is active after the step.
        active: id of the model that is active after the step.
        entries: number of entries in the collection maintained by the cycle.
        searches: number of live searches answered during the step.
        failed: number of live searches that failed.
        seconds: duration of each part.
        link: the cycle's page of the run, relative to this page; empty if there is none.
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
    """Write the page, replacing it atomically.

    Args:
        path: file of the page.
        title: title of the page.
        summary: one or two sentences below the title.
        steps: the steps in order.
        promises: expected results, and whether they were met.

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
    """A frame of a video by its number from 0, as JPEG; the last one if the video is shorter."""
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
