"""Metrics of the history as charts: known ones in groups, unknown ones alone."""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree import ElementTree

from drawings import titled_groups

from resight.training.report.charts import constant_figures, epoch_charts, epoch_rows, figures_by_group


def history() -> list[dict[str, Any]]:
    rows = []
    for stage in ("teacher", "student"):
        for epoch in range(3):
            t = epoch + 1.0
            rows.append(
                {"stage": stage, "epoch": epoch, "loss": 3 / t, "loss_offline": 2 / t, "relation": 0.1 * t}
                | {"guidance": 0.2 / t if stage == "student" else 0.0, "sharpness": t, "outlier_share": 0.1 / t}
                | {"cameras_per_cluster": t, "chance_cameras_per_cluster": 5.0, "stability_ari": t / 4, "eps": 0.5}
                | {"mAP": 50 + t, "silhouette": 0.1 * t, "label_s": t, "images_per_s": 30 + t}
                | {"note": "text", "nothing": None, "flag": True, "broken": math.nan, "shape": [1, 2]}
            )
    return rows


def test_metrics_are_grouped_and_unknown_ones_are_alone() -> None:
    found = {group.title: names for group, names in figures_by_group(epoch_rows(history())).items()}
    assert found["Loss"] == ["loss", "loss_offline", "relation", "guidance"]
    assert found["Cameras per cluster"] == ["cameras_per_cluster", "chance_cameras_per_cluster"]
    assert found["Sharpness"] == ["sharpness"] and list(found)[-1] == "Sharpness"
    assert found["Images per second"] == ["images_per_s"] and found["Seconds an epoch"] == ["label_s"]
    names = [name for group in found.values() for name in group]
    assert not {"note", "nothing", "flag", "broken", "shape", "epoch", "stage"} & set(names)


def test_a_loss_term_that_is_always_zero_is_omitted() -> None:
    rows = epoch_rows(history())
    assert ["guidance" in row.figures for row in rows] == [False] * 3 + [True] * 3
    zeros = epoch_rows([{"stage": "teacher", "epoch": 0, "outlier_share": 0.0, "loss": 0.0}])
    assert zeros[0].figures == {"outlier_share": 0.0}  # a share of 0 is meaningful, a loss of 0 is not


def test_constant_metrics_are_listed_instead_of_drawn() -> None:
    rows = epoch_rows(history())
    assert constant_figures(rows) == {"eps": "0.5"}
    assert "Clustering radius eps" not in [chart.title for chart in epoch_charts(rows)]
    assert constant_figures(rows[:1]) == {} and epoch_charts(rows[:1]) == [] and epoch_charts([]) == []


def test_shares_are_drawn_in_percent_and_lines_end_with_their_stage() -> None:
    drawn = {chart.title: chart for chart in epoch_charts(epoch_rows(history()))}
    share = titled_groups(drawn["Share of crops, %"].svg)
    assert list(share) == ["teacher, outliers", "student, outliers"]
    assert all(len(list(line.iter("use"))) == 3 for line in share.values())  # one mark an epoch
    assert "10" in [text.text for text in ElementTree.fromstring(drawn["Share of crops, %"].svg).iter("text")]
    assert drawn["Loss"].legend == ["loss", "loss offline", "relation", "guidance"]
    assert len(titled_groups(drawn["Loss"].svg)) == 7  # no guidance in the teacher


def test_a_drawing_names_no_outside_resource_and_no_fixed_colour() -> None:
    for chart in epoch_charts(epoch_rows(history())):
        assert not re.search(r'href="(?!#)|https?://|<script|<style>.*import', chart.svg)
        assert "#fe01" not in chart.svg and "var(--s0)" in chart.svg


def test_names_with_markup_or_a_dollar_sign_are_plain_text() -> None:
    rows = [{"stage": "$a$ <b>", "epoch": epoch, "odd $x$ & <i>": float(epoch)} for epoch in range(2)]
    [chart] = epoch_charts(epoch_rows(rows))
    root = ElementTree.fromstring(chart.svg)
    assert root.get("aria-label") == "Odd $x$ & <i>"
    assert "$a$ <b>" in [text.text for text in root.iter("text")]
    assert list(titled_groups(chart.svg)) == ["$a$ <b>, odd $x$ & <i>"]
