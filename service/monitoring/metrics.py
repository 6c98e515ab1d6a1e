"""Prometheus metrics: counters of calls, and gauges of queues, models, indexes, disk and shadows read at each scrape.

Label values never come from persons, tokens or free text of a request: methods are those served, codes and reasons
those of the tables, and collections beyond a configured number are summed up under one label. Gauges are collected in
the event loop, which owns the objects they describe; the thread that answers the scrape only writes them out.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import get_args

import grpc
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.registry import Collector

from resight.calibration import Decision
from resight.errors import ReIDError
from resight.service import call_events
from resight.service.access.interceptors import ServerCall
from resight.service.inference.embedder import Embedder
from resight.service.inference.models import ModelHost
from resight.service.jobs.shadow import ShadowManager, ShadowStatus
from resight.service.records import now_us
from resight.service.settings import Settings
from resight.service.storage import reads
from resight.service.storage.data_folder import disk_room
from resight.service.tenants import Tenant, Tenants
from resight.status import reason_of

# Half a millisecond (a search among thousands) to the ten seconds of the default deadline.
LATENCY_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SHED_REASONS = frozenset(
    "OVERLOADED RATE_LIMITED EXPIRED_IN_QUEUE DEADLINE_PASSED DRAINING MODEL_NOT_READY "
    "DISK_WATERMARK STORAGE_FULL COLLECTION_FULL".split()
)
"""Error reasons caused by the server's state, not by the request."""


class CallMetrics:
    """The metrics of one server's calls: an interceptor, and a listener to the events of each call.

    Attributes:
        registry: of this server only, so that two servers in one process have separate metrics.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double the number of series, without a use
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._calls = Counter("resight_requests", "Calls answered.", ("method", "code"), registry=registry)
        self._running = Gauge("resight_requests_in_flight", "Calls being served.", registry=registry)
        self._total = Histogram(
            "resight_request_seconds",
            "Seconds from a call's arrival to its end; of a stream, its whole length.",
            ("method",),
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        stages = Histogram(
            "resight_stage_seconds",
            "Seconds of a call that a stage took, wall clock; stages of different crops overlap.",
            ("stage",),
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._shed = Counter(
            "resight_shed", "Calls or items refused because of the server's state.", ("reason",), registry=registry
        )
        self._errors = Counter(
            "resight_errors", "Calls or items answered with an error.", ("reason",), registry=registry
        )
        self._decided = Counter(
            "resight_searches",
            "Queries searched, by the decision on their best hit.",
            ("decision",),
            registry=registry,
        )
        # Looked up once: five stages per call would otherwise each look up their child.
        self._stages = {stage: stages.labels(stage) for stage in get_args(call_events.Stage)}
        for reason in SHED_REASONS:
            self._shed.labels(reason)
        for decision in ("match", "uncertain", "unknown", "uncalibrated"):
            self._decided.labels(decision)

    @contextlib.asynccontextmanager
    async def __call__(self, call: ServerCall) -> AsyncIterator[None]:
        """Count a call, however it ends, and listen to its events."""
        started, code = time.perf_counter(), grpc.StatusCode.OK
        self._running.inc()
        try:
            with call_events.listen_to_call(self):
                yield
        except grpc.aio.AbortError:
            code = call.code()
            raise
        except BaseException:
            code = grpc.StatusCode.CANCELLED  # the client left; all other errors arrive as AbortError
            raise
        finally:
            self._running.dec()
            self._calls.labels(call.method, code.name).inc()
            self._total.labels(call.method).observe(time.perf_counter() - started)

    def stage_ended(self, stage: call_events.Stage, started_ns: int, ended_ns: int) -> None:
        """Record a stage's duration."""
        self._stages[stage].observe((ended_ns - started_ns) / 1e9)

    def failed(self, error: ReIDError) -> None:
        """Count an error by its reason, and among them refusals caused by load."""
        reason = reason_of(error)
        self._errors.labels(reason).inc()
        if reason in SHED_REASONS:
            self._shed.labels(reason).inc()

    def decided(self, decisions: Sequence[Decision | None]) -> None:
        """Count the decisions on best hits."""
        for decision in decisions:
            self._decided.labels(decision or "uncalibrated").inc()


SHADOW_LABELS = ("tenant", "collection", "model")
SHADOW_SHARES = (
    ("resight_shadow_top1_agreement", "Share of sampled searches whose best hits agree.", "top1_agreement"),
    ("resight_shadow_overlap_at_10", "Mean share of the first ten entries that both models return.", "overlap_at_10"),
    (
        "resight_shadow_decision_agreement",
        "Share of searches with equal decisions of both models.",
        "decision_agreement",
    ),
    ("resight_shadow_cosine_shift", "Mean best-hit cosine minus that of the active model.", "cosine_shift"),
)


def shadow_metrics(running: Sequence[tuple[str, ShadowStatus]]) -> list[Metric]:
    """Metric families of running shadows, given with their tenants; unknown values have no sample."""
    outcomes = CounterMetricFamily(
        "resight_shadow_searches", "Sampled searches, by outcome.", labels=[*SHADOW_LABELS, "outcome"]
    )
    unknown = GaugeMetricFamily(
        "resight_shadow_unknown_share", "Share of decisions that are unknown.", labels=[*SHADOW_LABELS, "side"]
    )
    seconds = GaugeMetricFamily(
        "resight_shadow_seconds",
        "Inference of one crop and search, both models at the same low priority, newest 1000.",
        labels=[*SHADOW_LABELS, "side", "quantile"],
    )
    shares = {field: GaugeMetricFamily(name, what, labels=SHADOW_LABELS) for name, what, field in SHADOW_SHARES}
    for tenant, status in running:
        labels, figures = [tenant, status.collection, status.model_id], status.figures
        for outcome in ("answered", "dropped", "failed"):
            outcomes.add_metric([*labels, outcome], getattr(figures, outcome))
        for field, family in shares.items():
            if (share := getattr(figures, field)) is not None:
                family.add_metric(labels, share)
        for name, side in (("active", figures.active), ("candidate", figures.candidate)):
            if side.unknown_share is not None:
                unknown.add_metric([*labels, name], side.unknown_share)
            if side.measured:
                seconds.add_metric([*labels, name, "0.5"], side.total_p50_ns / 1e9)
                seconds.add_metric([*labels, name, "0.95"], side.total_p95_ns / 1e9)
    return [outcomes, *shares.values(), unknown, seconds]


BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
OTHER_COLLECTIONS = "_other"  # names of collections and tenants cannot begin with an underscore
COLLECTION_GAUGES = (
    ("resight_collection_entries", "Entries in the index; expired ones until the purge.", "entries"),
    ("resight_index_tombstones", "Deleted entries that still use memory in the index.", "tombstones"),
    ("resight_index_bytes", "Memory of the index.", "index_bytes"),
)


class ServerGauges(Collector):
    """A Prometheus collector that returns the metrics of the last `gather`.

    Args:
        settings: of the server.
        embedder: for its queues.
        models: for the loaded models.
        tenants: for their collections and stores.
        shadows: for the running ones.
    """

    def __init__(
        self, settings: Settings, embedder: Embedder, models: ModelHost, tenants: Tenants, shadows: ShadowManager
    ) -> None:
        self._settings, self._embedder, self._models, self._tenants = settings, embedder, models, tenants
        self._shadows = shadows
        self._found: list[Metric] = []

    def collect(self) -> Iterable[Metric]:
        """The metrics gathered last."""
        return self._found

    def clear(self) -> None:
        """Report nothing until `gather` succeeds: stale values would hide that it fails."""
        self._found = []

    async def gather(self) -> None:
        """Update all gauges; reads one row per collection of each open tenant."""
        open_tenants = self._tenants.open_tenants()
        self._found = [*self._queues(open_tenants), *self._loaded(), *self._kept(open_tenants)]
        self._found += await self._collections(open_tenants)
        self._found += shadow_metrics(self._shadows.running()[: self._settings.metrics_collections])

    def _queues(self, tenants: list[Tenant]) -> Iterator[Metric]:
        depth = GaugeMetricFamily("resight_queue_depth", "Crops admitted and not yet answered.", labels=["priority"])
        for priority, waiting in self._embedder.waiting().items():
            depth.add_metric([priority.name.lower()], waiting)
        yield depth
        yield _gauge("resight_queue_limit", "Maximum number of admitted crops per priority.", self._settings.max_queue)
        searching = sum(tenant.gallery.searcher.waiting for tenant in tenants)
        yield _gauge("resight_search_queue_depth", "Queries waiting or being searched.", searching)
        sizes, total, buckets = self._embedder.batch_sizes(), 0, []
        for most in BATCH_SIZE_BUCKETS:
            total = sum(count for size, count in sizes.items() if size <= most)
            buckets.append((str(float(most)), float(total)))
        buckets.append(("+Inf", float(sum(sizes.values()))))
        crops = float(sum(size * count for size, count in sizes.items()))
        batches = HistogramMetricFamily("resight_batch_size", "Crops of one inference.")
        batches.add_metric([], buckets, crops)
        yield batches

    def _loaded(self) -> Iterator[Metric]:
        models = InfoMetricFamily(
            "resight_model", "The loaded models, the spaces of their features, and which is active."
        )
        for model_id in self._models.names():
            model = self._models.status(model_id).loaded
            if model is not None:
                active = str(model is self._models.active).lower()
                body = {"model": model_id, "space": model.space.space_id, "version": model.space.model_version}
                models.add_metric([], {**body, "provider": model.provider, "active": active})
        yield models

    def _kept(self, tenants: list[Tenant]) -> Iterator[Metric]:
        free, total = disk_room(self._settings.data)
        yield _gauge("resight_disk_free_bytes", "Free on the data folder's disk.", free)
        yield _gauge("resight_disk_total_bytes", "Size of the data folder's disk.", total)
        low = any(tenant.store.is_low for tenant in tenants)
        yield _gauge("resight_disk_low", "1 while writes are refused because of too little disk space.", low)
        paths = [tenant.store.path for tenant in tenants]
        logs = [path.with_name(f"{path.name}-wal") for path in paths]
        yield _gauge("resight_database_bytes", "Databases of the open tenants.", sum(map(_file_size, paths)))
        yield _gauge("resight_wal_bytes", "Their write-ahead logs.", sum(map(_file_size, logs)))
        yield _gauge("resight_tenants_open", "Galleries in memory.", len(tenants))
        age_s = time.monotonic() - self._tenants.purged_s
        yield _gauge("resight_purge_age_seconds", "Since the last successful purge, or the start.", age_s)
        waiting = [tenant.audit.waiting for tenant in tenants]
        oldest_us = min((one.oldest_us for one in waiting if one.rows), default=now_us())
        yield _gauge("resight_audit_waiting_rows", "Audit rows not yet on disk.", sum(one.rows for one in waiting))
        yield _gauge("resight_audit_lag_seconds", "Age of the oldest of them.", max(0, now_us() - oldest_us) / 1e6)
        lost = CounterMetricFamily("resight_audit_lost", "Audit rows dropped because they could not be written.")
        lost.add_metric([], sum(one.lost for one in waiting))
        yield lost

    async def _collections(self, tenants: list[Tenant]) -> list[Metric]:
        labels = ["tenant", "collection"]
        gauges = {name: GaugeMetricFamily(name, what, labels=labels) for name, what, _ in COLLECTION_GAUGES}
        lag = GaugeMetricFamily("resight_revision_lag", "Writes not yet applied to the index.", labels=labels)
        recall = GaugeMetricFamily(
            "resight_sampled_recall_at_10", "Of approximate searches against exact ones, sampled.", labels=labels
        )
        index = GaugeMetricFamily(
            "resight_score_drift_psi",
            "Population stability index of recent best-hit cosines against the first 1000 searches in the space.",
            labels=[*labels, "space"],
        )
        shift = GaugeMetricFamily(
            "resight_score_mean_shift",
            "Recent mean best-hit cosine minus that of the first 1000 searches in the space.",
            labels=[*labels, "space"],
        )
        kinds = GaugeMetricFamily("resight_indexes", "Indexes of each kind.", labels=["kind"])
        count: dict[str, int] = {}
        rest = dict.fromkeys(gauges, 0)
        rest_lag, position, rest_drift = 0, 0, (0.0, 0.0)
        for tenant in tenants:
            for collection in await tenant.store.read(reads.collections, limit=-1):
                stats, position = tenant.gallery.searcher.stats(collection), position + 1
                count[stats.index_type] = count.get(stats.index_type, 0) + 1
                behind = max(0, collection.revision - stats.revision)
                drift = tenant.gallery.statistics.drift(collection)
                if position > self._settings.metrics_collections:
                    rest = {name: rest[name] + getattr(stats, field) for name, _, field in COLLECTION_GAUGES}
                    rest_lag, rest_drift = max(rest_lag, behind), max(rest_drift, drift or rest_drift)
                    continue
                where = [tenant.name, collection.name]
                for name, _, field in COLLECTION_GAUGES:
                    gauges[name].add_metric(where, getattr(stats, field))
                lag.add_metric(where, behind)
                if drift is not None:
                    index.add_metric([*where, collection.space.space_id], drift[0])
                    shift.add_metric([*where, collection.space.space_id], drift[1])
                if stats.sampled_recall_at_10 is not None:
                    recall.add_metric(where, stats.sampled_recall_at_10)
        if position > self._settings.metrics_collections:
            for name, family in gauges.items():
                family.add_metric([OTHER_COLLECTIONS, OTHER_COLLECTIONS], rest[name])
            lag.add_metric([OTHER_COLLECTIONS, OTHER_COLLECTIONS], rest_lag)
            index.add_metric([OTHER_COLLECTIONS, OTHER_COLLECTIONS, OTHER_COLLECTIONS], rest_drift[0])
            shift.add_metric([OTHER_COLLECTIONS, OTHER_COLLECTIONS, OTHER_COLLECTIONS], rest_drift[1])
        for kind, number in count.items():
            kinds.add_metric([kind], number)
        return [*gauges.values(), lag, recall, index, shift, kinds]


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(name, what, value=float(value))


def _file_size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0
