"""Metrics of the shadows that run, as they stand at a scrape; what has ended is told by `GetShadow` alone."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from resight.service.shadow import Told

LABELS = ("tenant", "collection", "model")
SHARES = (
    ("resight_shadow_top1_agreement", "Share of sampled searches whose best hits agree.", "top1_agreement"),
    ("resight_shadow_overlap_at_10", "Mean share of entries that both models name among ten.", "overlap_at_10"),
    ("resight_shadow_decision_agreement", "Share that both models decide alike.", "decision_agreement"),
    ("resight_shadow_cosine_shift", "Mean best-hit cosine less that of the active model.", "cosine_shift"),
)


def shadow_metrics(running: Sequence[tuple[str, Told]]) -> list[Metric]:
    """Families of all shadows, by tenant; a figure that is not known yet has no sample."""
    outcomes = CounterMetricFamily(
        "resight_shadow_searches", "Sampled searches, by what became of them.", labels=[*LABELS, "outcome"]
    )
    unknown = GaugeMetricFamily(
        "resight_shadow_unknown_share", "Share of decisions that are unknown.", labels=[*LABELS, "side"]
    )
    seconds = GaugeMetricFamily(
        "resight_shadow_seconds",
        "Inference of one crop and search, both models at the same low priority, newest 1000.",
        labels=[*LABELS, "side", "quantile"],
    )
    shares = {field: GaugeMetricFamily(name, what, labels=LABELS) for name, what, field in SHARES}
    for tenant, told in running:
        where, figures = [tenant, told.collection, told.model_id], told.figures
        for outcome in ("answered", "dropped", "failed"):
            outcomes.add_metric([*where, outcome], getattr(figures, outcome))
        for field, family in shares.items():
            if (share := getattr(figures, field)) is not None:
                family.add_metric(where, share)
        for name, side in (("active", figures.active), ("candidate", figures.candidate)):
            if side.unknown_share is not None:
                unknown.add_metric([*where, name], side.unknown_share)
            if side.measured:
                seconds.add_metric([*where, name, "0.5"], side.total_p50_ns / 1e9)
                seconds.add_metric([*where, name, "0.95"], side.total_p95_ns / 1e9)
    return [outcomes, *shares.values(), unknown, seconds]
