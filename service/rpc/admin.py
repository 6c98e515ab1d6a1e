"""AdminService: server information, indexes, snapshots, audit, search statistics and adaptation requests."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

from resight.errors import InputError
from resight.service.access.auth import current
from resight.service.access.interceptors import Context
from resight.service.inference.models import ModelHost
from resight.service.jobs.runner import JobCancelled, JobRunner
from resight.service.records import Filter
from resight.service.rpc import convert
from resight.service.rpc.convert import check_request_id, key_of_token, page_size, page_token, timestamp
from resight.service.rpc.operations import operation_message, state_of
from resight.service.search.statistics import WindowStats
from resight.service.settings import Settings
from resight.service.storage import operations, reads, snapshots
from resight.service.storage.audit import AuditEvent
from resight.service.storage.data_folder import disk_bytes
from resight.service.storage.operations import REBUILD, Operation
from resight.service.tenants import Tenant, Tenants
from resight.v1 import admin_pb2, admin_pb2_grpc


def window_stats_message(stats: WindowStats, *, active: bool) -> admin_pb2.SearchStatistics:
    """Convert the statistics of one space; ``active``: whether the collection is currently searched in it."""
    counts = stats.counts
    decided = counts.matches + counts.uncertain + counts.unknown
    drift = stats.reference.drift_of(counts)
    return admin_pb2.SearchStatistics(
        space_id=stats.space_id,
        model_id=stats.model_id,
        active=active,
        searches=counts.searches,
        matches=counts.matches,
        uncertain=counts.uncertain,
        unknown=counts.unknown,
        without_hit=counts.searches - counts.hits,
        unknown_share=counts.unknown / decided if decided else None,
        mean_cosine=counts.cosine_sum / counts.hits if counts.hits else None,
        mean_probability=counts.probability_sum / counts.probable if counts.probable else None,
        drift_index=None if drift is None else drift[0],
        mean_shift=None if drift is None else drift[1],
        reference_searches=stats.reference.hits,
        first_time=timestamp(counts.first_us),
        last_time=timestamp(counts.last_us),
        cosine_histogram=counts.bins.tolist(),
    )


INDEX_TYPES = ("", "auto", "flat", "flat-fp16", "hnsw")
PROGRESS_EVERY_S = 0.2  # between two progress updates of a snapshot


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """See admin.proto."""

    def __init__(self, tenants: Tenants, models: ModelHost, jobs: JobRunner, settings: Settings) -> None:
        self._tenants, self._models, self._jobs, self._settings = tenants, models, jobs, settings

    async def _tenant(self) -> Tenant:
        """The caller's tenant."""
        return await self._tenants.tenant(current().tenant)

    async def GetServerInfo(
        self, request: admin_pb2.GetServerInfoRequest, context: Context
    ) -> admin_pb2.GetServerInfoResponse:
        """Version, active model and limits."""
        settings, active = self._settings, self._models.active
        limits = admin_pb2.Limits(
            max_message_bytes=settings.max_message_bytes,
            max_image_bytes=settings.max_image_bytes,
            max_image_pixels=settings.max_image_pixels,
            max_batch_items=settings.max_batch_items,
            max_shots=settings.max_shots,
            max_top_k=settings.max_top_k,
            max_queue_items=settings.max_queue,
            max_rerank_candidates=settings.max_rerank_candidates,
        )
        return admin_pb2.GetServerInfoResponse(
            server_version=version("resight"),
            active_space=convert.space_message(active.space),
            limits=limits,
            provider=active.provider,
        )

    async def GetCollectionStats(
        self, request: admin_pb2.GetCollectionStatsRequest, context: Context
    ) -> admin_pb2.GetCollectionStatsResponse:
        """State of a collection and its index."""
        tenant = await self._tenant()
        collection = await tenant.gallery.collection(request.collection_id)
        index = tenant.gallery.searcher.stats(collection)
        return admin_pb2.GetCollectionStatsResponse(
            live_entries=await tenant.store.read(reads.count, collection.key, Filter()),
            tombstones=index.tombstones,
            expired_pending=await tenant.store.read(reads.expired, collection.key),
            disk_bytes=await asyncio.to_thread(disk_bytes, tenant.store.folder),
            index_bytes=index.index_bytes,
            index_type=index.index_type,
            sampled_recall_at_10=index.sampled_recall_at_10,
            revision_lag=max(0, collection.revision - index.revision),
        )

    async def RebuildIndex(
        self, request: admin_pb2.RebuildIndexRequest, context: Context
    ) -> admin_pb2.RebuildIndexResponse:
        """Start to rebuild a collection's index; the old one serves meanwhile."""
        if request.index_type not in INDEX_TYPES:
            raise InputError(
                f"expected index_type {', '.join(INDEX_TYPES[1:])} or empty, found {request.index_type[:40]!r}",
                field="index_type",
            )
        tenant = await self._tenant()
        collection = await tenant.gallery.collection(request.collection_id)

        async def rebuild(operation: Operation) -> dict[str, str]:
            built = await tenant.gallery.searcher.rebuild(collection, request.index_type)
            count = await tenant.store.read(reads.count, collection.key, Filter())
            await tenant.operations.progress(operation.operation_id, total=count, succeeded=count)
            recall = built.sampled_recall_at_10
            result = {"index_type": built.index_type, "note": built.note}
            return result | ({} if recall is None else {"recall_at_10": f"{recall:.4f}"})

        started = await self._jobs.start(tenant.operations, REBUILD, rebuild, collection=collection.name)
        return admin_pb2.RebuildIndexResponse(operation=operation_message(started))

    async def CreateSnapshot(
        self, request: admin_pb2.CreateSnapshotRequest, context: Context
    ) -> admin_pb2.CreateSnapshotResponse:
        """Start an online copy of the tenant's database."""
        name = snapshots.check_name(request.snapshot_id or snapshots.timestamp_name())
        tenant = await self._tenant()
        started = await self._jobs.start(
            tenant.operations, "snapshot", _SnapshotJob(tenant, name).run, snapshot_id=name
        )
        return admin_pb2.CreateSnapshotResponse(operation=operation_message(started))

    async def ListAuditEvents(
        self, request: admin_pb2.ListAuditEventsRequest, context: Context
    ) -> admin_pb2.ListAuditEventsResponse:
        """Audit rows of a time window, newest first, paginated."""
        limit = page_size(request.page_size)
        start_us, end_us = convert.to_window(request.window, "window")
        before = key_of_token(request.page_token) or None
        audit = (await self._tenant()).audit
        found = await audit.list_events(start_us=start_us, end_us=end_us, before=before, limit=limit + 1)
        more = len(found) > limit
        return admin_pb2.ListAuditEventsResponse(
            events=[_audit_event_message(event) for event in found[:limit]],
            next_page_token=page_token(int(found[limit - 1].audit_id)) if more else "",
        )

    async def GetSearchStatistics(
        self, request: admin_pb2.GetSearchStatisticsRequest, context: Context
    ) -> admin_pb2.GetSearchStatisticsResponse:
        """Statistics of a collection's searches, for each space."""
        window = convert.to_window(request.window, "window")
        reference = convert.to_window(request.reference, "reference") if request.HasField("reference") else None
        gallery = (await self._tenant()).gallery
        collection = await gallery.collection(request.collection_id)
        stats = await gallery.statistics.window_stats(
            collection, window=window, space_id=request.space_id, reference=reference
        )
        statistics = [window_stats_message(one, active=one.space_id == collection.space.space_id) for one in stats]
        return admin_pb2.GetSearchStatisticsResponse(statistics=statistics)

    async def GetSearchFigures(
        self, request: admin_pb2.GetSearchFiguresRequest, context: Context
    ) -> admin_pb2.GetSearchFiguresResponse:
        """Deprecated name of `GetSearchStatistics`; the messages of both have the same fields."""
        same = admin_pb2.GetSearchStatisticsRequest.FromString(request.SerializeToString())
        response = await self.GetSearchStatistics(same, context)
        return admin_pb2.GetSearchFiguresResponse.FromString(response.SerializeToString())

    async def StartAdaptation(
        self, request: admin_pb2.StartAdaptationRequest, context: Context
    ) -> admin_pb2.StartAdaptationResponse:
        """Request a run of a site's cycle."""
        check_request_id(request.request_id)
        store = (await self._tenant()).store
        requested = await store.write(operations.request_adaptation, request.job_spec_id, request_id=request.request_id)
        return admin_pb2.StartAdaptationResponse(operation=operation_message(requested))

    async def ReportAdaptation(
        self, request: admin_pb2.ReportAdaptationRequest, context: Context
    ) -> admin_pb2.ReportAdaptationResponse:
        """Record the progress of a requested run, reported by the site's cycle."""
        state = state_of(request.state)
        if state is None:
            raise InputError("expected state RUNNING, SUCCEEDED or FAILED", field="state")
        reported = await (await self._tenant()).store.write_unchecked(
            operations.report_adaptation, request.operation_id, state, result=dict(request.result), error=request.error
        )
        return admin_pb2.ReportAdaptationResponse(operation=operation_message(reported))


class _SnapshotJob:
    """One snapshot: the copy runs in a thread, and its progress is written to the operation periodically."""

    def __init__(self, tenant: Tenant, name: str) -> None:
        self._tenant, self._name = tenant, name
        self._done, self._total, self._cancelled = 0, 0, False

    async def run(self, operation: Operation) -> dict[str, str]:
        copying = asyncio.create_task(
            asyncio.to_thread(snapshots.create, self._tenant.store.path, self._name, progress=self._on_progress)
        )
        try:
            while not copying.done():
                await asyncio.wait((copying,), timeout=PROGRESS_EVERY_S)
                await self._write_progress(operation.operation_id)
            snapshot = await copying
        except asyncio.CancelledError:
            self._cancelled = True  # the server is stopping; `_on_progress` ends the thread
            await asyncio.wait((copying,))
            raise
        return {"snapshot_id": snapshot.name, "bytes": str(snapshot.bytes), "sha256": snapshot.sha256}

    async def _write_progress(self, operation_id: str) -> None:
        now = await self._tenant.operations.progress(operation_id, total=self._total, succeeded=self._done)
        self._cancelled |= now.cancel_requested

    def _on_progress(self, done: int, total: int) -> None:
        if self._cancelled:
            raise JobCancelled
        self._done, self._total = done, total


def _audit_event_message(event: AuditEvent) -> admin_pb2.AuditEvent:
    """Convert an audit row."""
    return admin_pb2.AuditEvent(
        audit_id=event.audit_id,
        event_time=convert.timestamp(event.at_us),
        principal=event.principal,
        method=event.method,
        collection_id=event.collection,
        subject_hash=event.subject_hash,
        affected_count=event.affected,
        reason=event.reason,
    )
