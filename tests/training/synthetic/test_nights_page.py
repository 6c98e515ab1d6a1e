"""The page of simulated nights: it shows every step, loads nothing external, and escapes texts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from resight.image import decode
from resight.training.synthetic.film import RenderedFrame, write_video
from resight.training.synthetic.nights_page import DemoStep, extract_frame, write_nights_page
from resight.training.synthetic.street import HEIGHT, WIDTH


def test_the_page_shows_every_step_and_loads_nothing_external(tmp_path: Path) -> None:
    frames = [RenderedFrame(np.full((HEIGHT, WIDTH, 3), 40 * number, np.uint8), ()) for number in range(5)]
    recorded = write_video(tmp_path, "door", frames, start_s=0.0, seed=1)
    picture = extract_frame(recorded.video, 3)
    assert abs(int(decode(picture).mean()) - 120) < 4
    assert abs(int(decode(extract_frame(recorded.video, 99)).mean()) - 160) < 4
    steps = [
        DemoStep(
            "Night 1", "the first", "promoted", "better <b>", 20.1, 20.1, 55.5, "m1", 9, 5, 0, {"film": 2.0}, "a.html"
        ),
        DemoStep(
            "Night 2", "the next", "rolled_back", "worse", 21.5, 50.2, 50.3, "m1", 9, 5, 1, pictures={"door": picture}
        ),
    ]
    write_nights_page(tmp_path / "page.html", title="Nights", summary="All.", steps=steps, promises=[("kept", False)])
    page = (tmp_path / "page.html").read_text()
    for words in ("55.5", "+35.4", "better &lt;b&gt;", "rolled back", "5 answered, 1 failed", 'href="a.html"', "✗"):
        assert words in page
    assert all(source.startswith("data:image/jpeg") for source in re.findall(r'src="([^"]*)"', page))
