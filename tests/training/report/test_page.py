from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from resight.training.report.adaptation import AdaptationReport, render, write_report
from resight.training.report.charts import EpochRow
from resight.training.report.embedding_map import EmbeddingMap
from resight.training.report.montage import ClusterGroup, ClusterSample
from resight.training.report.page import CropImage
from resight.training.report.ranked_lists import RankedHit, RankedList

JPEG = b"\xff\xd8\xff\xe0" + bytes(64) + b"\xff\xd9"
VOID = {"meta", "img", "br", "hr", "link", "input", "col", "path", "line", "circle", "rect", "polyline", "use"}
HOSTILE = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Open tags, and all resources that the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.names: list[str] = []
        self.targets: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        self.names += [value or "" for name, value in attrs if name == "id"]
        for name, value in attrs:
            if name == "aria-labelledby" or (name == "href" and (value or "").startswith("#")):
                self.targets.add((value or "").lstrip("#"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
            self.open.pop()


def full() -> AdaptationReport:
    hits = [
        RankedHit(JPEG, "cam2", 0.8, "right"),
        RankedHit(JPEG, "cam3", 0.6, "wrong"),
        RankedHit(JPEG, "cam1", 0.5, "junk"),
    ]
    return AdaptationReport(
        title=HOSTILE,
        summary=HOSTILE,
        before={"mAP": 30.0, "rank1": 40.0},
        after={"mAP": 50.0, "rank1": 61.5},
        epochs=[
            EpochRow("teacher", 0, {"loss": 3.0, "lr": 3e-4, "clusters": 12, "outlier_share": 0.2, "nmi": 0.8}),
            EpochRow("teacher", 1, {"loss": 2.0, "lr": 3e-4, "clusters": 14, "outlier_share": 0.1, "nmi": 0.9}),
            EpochRow("student", -1, {"loss": 1.0, "guidance": 0.3, "clusters": 15, HOSTILE: 2.0}),
        ],
        clusters=[
            ClusterGroup("Best", HOSTILE, [ClusterSample(3, 20, [CropImage(JPEG, HOSTILE)], 2, 0.25, purity=0.9)])
        ],
        map=EmbeddingMap(
            np.eye(12, 2, dtype=np.float32), np.arange(12) % 3 - 1, np.arange(12) % 2, [HOSTILE, "b"], 40, 0.6, 0.5
        ),
        notes=[HOSTILE],
        ranked=[RankedList(CropImage(JPEG, "cam1"), hits, hits[:1])],
        seconds={"adapt": 61.0, HOSTILE: 1.0},
        config={"name": "purify", "cluster": {"eps": "auto"}, "note": HOSTILE},
        model={"backbone": "osnet_x0_25"},
    )


@pytest.mark.parametrize(
    "report", [full(), AdaptationReport("empty"), AdaptationReport("half", before={"mAP": 1.0}, clusters=[])]
)
def test_the_page_is_well_formed_and_loads_no_resources(report: AdaptationReport) -> None:
    page = Page()
    page.feed(render(report))
    assert page.open == []
    assert len(page.names) == len(set(page.names)) and page.targets <= set(page.names)
    assert all(target.startswith(("data:", "#")) for target in page.loaded)
    assert "script" not in page.tags


def test_hostile_names_are_escaped_everywhere() -> None:
    text = render(full())
    assert HOSTILE not in text and text.count("&lt;script&gt;") >= 4


def test_figures_and_verdicts_are_on_the_page() -> None:
    text = render(full())
    for word in ("30.0", "50.0", "61.5", "osnet_x0_25", "purify", "cam2"):
        assert word in text, word
    for word in ("silhouette 0.25", "purity 90 %", "2 cameras", "12 of 40 crops", "cluster 1 (4)"):
        assert word in text, word
    assert text.count("data:image/jpeg;base64,") >= 6


def test_one_epoch_is_a_table_without_charts() -> None:
    text = render(AdaptationReport("one", epochs=[EpochRow("teacher", 0, {"loss": 3.0})]))
    assert "<svg" not in text and "<details open>" in text and ">teacher 0<" in text


def test_writing_replaces_a_page_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(path, AdaptationReport("first"))
    write_report(path, AdaptationReport("second"))
    assert "second" in path.read_text() and [file.name for file in path.parent.iterdir()] == ["report.html"]
