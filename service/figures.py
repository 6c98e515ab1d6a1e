"""What stands in a server at the moment of a scrape: queues, models, indexes, disk, purge, audit.

Gathered in the event loop, whose objects these are; the thread that answers the scrape only writes them out.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from resight.service import reads
from resight.service.disk import room
from resight.service.embedder import Embedder
from resight.service.entries import now_us
from resight.service.models import ModelHost
from resight.service.settings import Settings
from resight.service.shadow_metrics import shadow_metrics
from resight.service.shadows import Shadows
from resight.service.tenants import Tenant, Tenants

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
OTHER = "_other"  # no name of a collection or a tenant begins so
PER_COLLECTION = (
    ("resight_collection_entries", "Entries in the index; expired ones until the purge.", "entries"),
    ("resight_index_tombstones", "Deleted entries that still take room in the index.", "tombstones"),
    ("resight_index_bytes", "Memory of the index.", "index_bytes"),
)


class Figures(Collector):
    """Hands a registry what `gather` found last.

    Args:
        settings: of the server.
        embedder: whose queues.
        models: which are loaded.
        tenants: whose collections.
        shadows: which run.
    """

    def __init__(
        self, settings: Settings, embedder: Embedder, models: ModelHost, tenants: Tenants, shadows: Shadows
    ) -> None:
        self._settings, self._embedder, self._models, self._tenants = settings, embedder, models, tenants
        self._shadows = shadows
        self._found: list[Metric] = []

    def collect(self) -> Iterable[Metric]:
        """What was gathered."""
        return self._found

    def forget(self) -> None:
        """Tell nothing until `gather` succeeds: an old figure would hide that nothing moves."""
        self._found = []

    async def gather(self) -> None:
        """Look at everything anew; reads one row a collection of each open tenant."""
        open_tenants = self._tenants.opened()
        self._found = [*self._queues(open_tenants), *self._loaded(), *self._kept(open_tenants)]
        self._found += await self._collections(open_tenants)
        self._found += shadow_metrics(self._shadows.running()[: self._settings.metrics_collections])

    def _queues(self, tenants: list[Tenant]) -> Iterator[Metric]:
        depth = GaugeMetricFamily("resight_queue_depth", "Crops admitted and not yet answered.", labels=["priority"])
        for priority, waiting in self._embedder.waiting().items():
            depth.add_metric([priority.name.lower()], waiting)
        yield depth
        yield _gauge(
            "resight_queue_limit", "Crops of one priority that are admitted at most.", self._settings.max_queue
        )
        searching = sum(tenant.gallery.searcher.waiting for tenant in tenants)
        yield _gauge("resight_search_queue_depth", "Queries that wait or are searched.", searching)
        sizes, total, buckets = self._embedder.batch_sizes(), 0, []
        for most in SIZES:
            total = sum(count for size, count in sizes.items() if size <= most)
            buckets.append((str(float(most)), float(total)))
        buckets.append(("+Inf", float(sum(sizes.values()))))
        crops = float(sum(size * count for size, count in sizes.items()))
        batches = HistogramMetricFamily("resight_batch_size", "Crops of one inference.")
        batches.add_metric([], buckets, crops)
        yield batches

    def _loaded(self) -> Iterator[Metric]:
        told = InfoMetricFamily(
            "resight_model", "The loaded models, the spaces of their features, and which is active."
        )
        for model_id in self._models.names():
            model = self._models.info(model_id).loaded
            if model is not None:
                active = str(model is self._models.active).lower()
                body = {"model": model_id, "space": model.space.space_id, "version": model.space.model_version}
                told.add_metric([], {**body, "provider": model.provider, "active": active})
        yield told

    def _kept(self, tenants: list[Tenant]) -> Iterator[Metric]:
        free, total = room(self._settings.data)
        yield _gauge("resight_disk_free_bytes", "Free on the data folder's disk.", free)
        yield _gauge("resight_disk_total_bytes", "Size of the data folder's disk.", total)
        low = any(tenant.store.low for tenant in tenants)
        yield _gauge("resight_disk_low", "1 while writes are refused for want of room.", low)
        paths = [tenant.store.path for tenant in tenants]
        logs = [path.with_name(f"{path.name}-wal") for path in paths]
        yield _gauge("resight_database_bytes", "Databases of the open tenants.", sum(map(_size, paths)))
        yield _gauge("resight_wal_bytes", "Their write-ahead logs.", sum(map(_size, logs)))
        yield _gauge("resight_tenants_open", "Galleries in memory.", len(tenants))
        age_s = time.monotonic() - self._tenants.purged_s
        yield _gauge("resight_purge_age_seconds", "Since the last purge that ended well; before it, the start.", age_s)
        waiting = [tenant.audit.waiting for tenant in tenants]
        oldest_us = min((one.oldest_us for one in waiting if one.rows), default=now_us())
        yield _gauge("resight_audit_waiting_rows", "Audit rows not yet on disk.", sum(one.rows for one in waiting))
        yield _gauge("resight_audit_lag_seconds", "Age of the oldest of them.", max(0, now_us() - oldest_us) / 1e6)
        lost = CounterMetricFamily("resight_audit_lost", "Audit rows given up because the disk took none.")
        lost.add_metric([], sum(one.lost for one in waiting))
        yield lost

    async def _collections(self, tenants: list[Tenant]) -> list[Metric]:
        labels = ["tenant", "collection"]
        told = {name: GaugeMetricFamily(name, what, labels=labels) for name, what, _ in PER_COLLECTION}
        lag = GaugeMetricFamily("resight_revision_lag", "Writes the index has yet to take in.", labels=labels)
        recall = GaugeMetricFamily(
            "resight_sampled_recall_at_10", "Of approximate searches against exact ones, sampled.", labels=labels
        )
        index = GaugeMetricFamily(
            "resight_score_drift_psi",
            "Population stability index of late best-hit cosines against the first 1000 searches in the space.",
            labels=[*labels, "space"],
        )
        shift = GaugeMetricFamily(
            "resight_score_mean_shift",
            "Mean best-hit cosine of late less that of the first 1000 searches in the space.",
            labels=[*labels, "space"],
        )
        kinds = GaugeMetricFamily("resight_indexes", "Indexes of each kind.", labels=["kind"])
        count: dict[str, int] = {}
        rest = dict.fromkeys(told, 0)
        rest_lag, place, rest_drift = 0, 0, (0.0, 0.0)
        for tenant in tenants:
            for collection in await tenant.store.read(reads.collections, limit=-1):
                stats, place = tenant.gallery.searcher.stats(collection), place + 1
                count[stats.index_type] = count.get(stats.index_type, 0) + 1
                behind = max(0, collection.revision - stats.revision)
                drift = tenant.gallery.figures.drift(collection)
                if place > self._settings.metrics_collections:
                    rest = {name: rest[name] + getattr(stats, field) for name, _, field in PER_COLLECTION}
                    rest_lag, rest_drift = max(rest_lag, behind), max(rest_drift, drift or rest_drift)
                    continue
                where = [tenant.name, collection.name]
                for name, _, field in PER_COLLECTION:
                    told[name].add_metric(where, getattr(stats, field))
                lag.add_metric(where, behind)
                if drift is not None:
                    index.add_metric([*where, collection.space.space_id], drift[0])
                    shift.add_metric([*where, collection.space.space_id], drift[1])
                if stats.sampled_recall_at_10 is not None:
                    recall.add_metric(where, stats.sampled_recall_at_10)
        if place > self._settings.metrics_collections:
            for name, family in told.items():
                family.add_metric([OTHER, OTHER], rest[name])
            lag.add_metric([OTHER, OTHER], rest_lag)
            index.add_metric([OTHER, OTHER, OTHER], rest_drift[0])
            shift.add_metric([OTHER, OTHER, OTHER], rest_drift[1])
        for kind, number in count.items():
            kinds.add_metric([kind], number)
        return [*told.values(), lag, recall, index, shift, kinds]


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(name, what, value=float(value))


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0
