"""Between the wire and a search: what is asked checked field by field, what is answered spelled out."""

from __future__ import annotations

import numpy as np

from resight.calibration import Decision
from resight.errors import InputError, LimitError
from resight.service import translate
from resight.service.decide import Decider
from resight.service.entries import Space
from resight.service.features import Made
from resight.service.grouping import GroupBy
from resight.service.ranked import Ranked, RankedAnswer, Wanted
from resight.service.rerank import CANDIDATES, JOINED, K1, K2, WEIGHT, Method, Rerank
from resight.service.runtime import Feature
from resight.service.searcher import Query
from resight.service.settings import Settings
from resight.v1 import common_pb2, search_pb2

DEFAULT_TOP_K = 10
NOTHING: Feature = np.empty(0, np.float32)
GROUPS = {
    search_pb2.GROUP_BY_UNSPECIFIED: None,
    search_pb2.GROUP_BY_SUBJECT: GroupBy.SUBJECT,
    search_pb2.GROUP_BY_TRACK: GroupBy.TRACK,
    search_pb2.GROUP_BY_CAMERA: GroupBy.CAMERA,
}
METHODS: dict[int, Method | None] = {
    search_pb2.RERANKING_METHOD_UNSPECIFIED: None,
    search_pb2.RERANKING_METHOD_K_RECIPROCAL: "k_reciprocal",
    search_pb2.RERANKING_METHOD_QUERY_EXPANSION: "query_expansion",
}
ACCURACIES = frozenset(search_pb2.Accuracy.values())
DECISIONS: dict[Decision | None, common_pb2.Decision.ValueType] = {
    None: common_pb2.DECISION_UNSPECIFIED,
    "match": common_pb2.DECISION_MATCH,
    "uncertain": common_pb2.DECISION_UNCERTAIN,
    "unknown": common_pb2.DECISION_UNKNOWN,
}
UNKNOWN_VALUE = "%s has no value %d in this version: see search.proto"


def wanted(request: search_pb2.SearchRequest, settings: Settings) -> Wanted:
    """A search, checked, whose feature is yet to be made.

    Raises:
        InputError: a field out of its range.
        LimitError: ``top_k`` or the candidates beyond what is published.
    """
    top_k = request.top_k if request.HasField("top_k") else DEFAULT_TOP_K
    if not 1 <= top_k <= settings.max_top_k:
        raise LimitError(
            f"top_k is 1..{settings.max_top_k}, found {top_k}: leave it out for {DEFAULT_TOP_K}",
            field="top_k",
            max_top_k=settings.max_top_k,
        )
    least = request.min_cosine if request.HasField("min_cosine") else -1.0
    if not -1.0 <= least <= 1.0:
        raise InputError(f"min_cosine is -1..1, found {least}", field="min_cosine")
    probability = request.min_probability if request.HasField("min_probability") else None
    if probability is not None and not 0.0 <= probability <= 1.0:
        raise InputError(f"min_probability is 0..1, found {probability}", field="min_probability")
    if request.min_revision < 0:
        raise InputError(f"min_revision is 0 (none) or more, found {request.min_revision}", field="min_revision")
    if request.group_by not in GROUPS:
        raise InputError(UNKNOWN_VALUE % ("group_by", request.group_by), field="group_by")
    if request.accuracy not in ACCURACIES:
        raise InputError(UNKNOWN_VALUE % ("accuracy", request.accuracy), field="accuracy")
    return Wanted(
        Query(NOTHING, top_k, translate.filters(request.filter), least),
        min_probability=probability,
        group_by=GROUPS[request.group_by],
        rerank=_rerank(request.reranking, top_k, settings),
        exact=request.accuracy == search_pb2.ACCURACY_EXACT,
        with_features=request.include_embeddings,
    )


def _rerank(message: search_pb2.Reranking, top_k: int, settings: Settings) -> Rerank | None:
    """How hits are to be ordered anew; None = not at all."""
    if message.method not in METHODS:
        raise InputError(UNKNOWN_VALUE % ("method", message.method), field="reranking.method")
    method = METHODS[message.method]
    if method is None:
        return None
    most = settings.max_rerank_candidates
    candidates = message.candidates or max(min(CANDIDATES, most), top_k)
    if not top_k <= candidates <= most:
        raise LimitError(
            f"{top_k} (top_k) to {most} candidates are ordered anew, found {candidates}: leave it out for {CANDIDATES}",
            field="reranking.candidates",
            max_rerank_candidates=most,
        )
    k1 = message.k1 or (JOINED if method == "query_expansion" else K1)
    k2 = message.k2 or K2
    for name, value in (("k1", k1), ("k2", k2)):
        if not 1 <= value <= most:
            raise InputError(f"{name} is 1..{most}, or 0 for its default; found {value}", field=f"reranking.{name}")
    weight = float(getattr(message, "lambda")) if message.HasField("lambda") else WEIGHT  # a keyword of Python's
    if not 0.0 <= weight <= 1.0:
        raise InputError(f"lambda is 0..1, found {weight}", field="reranking.lambda")
    return Rerank(method, candidates, k1, k2, weight, most)


def score_message(similarity: float, probability: float | None) -> common_pb2.Score:
    """A score for the wire."""
    return common_pb2.Score(cosine=similarity, probability=probability)


def _hit(found: Ranked, space: Space) -> search_pb2.Hit:
    feature: Feature | None = found.hit.feature
    return search_pb2.Hit(
        entry=translate.entry_message(found.hit.entry),
        score=score_message(found.hit.similarity, found.probability),
        decision=DECISIONS[found.decision],
        ranking_score=found.ranking_score,
        group_size=found.group_size,
        embedding=None if feature is None else translate.feature_message(feature, space),
    )


def search_message(answer: RankedAnswer, space: Space, made: Made) -> search_pb2.SearchResponse:
    """The answer to one search for the wire."""
    return search_pb2.SearchResponse(
        hits=[_hit(found, space) for found in answer.hits],
        decision=DECISIONS[answer.decision],
        space=translate.space_message(space),
        searched_revision=answer.revision,
        exact=answer.exact,
        query_quality=made.quality,
        timings=translate.timings_message(made.timings, answer.search_ns, answer.rerank_ns),
        shots_used=made.used,
        shots_rejected=made.rejected,
    )


def verify_message(
    similarity: float, decider: Decider, space: Space, left: Made, right: Made
) -> search_pb2.VerifyResponse:
    """The answer to one comparison for the wire."""
    (judged,) = decider.judged([similarity])
    return search_pb2.VerifyResponse(
        score=score_message(similarity, judged.probability),
        decision=DECISIONS[judged.decision],
        space=translate.space_message(space),
        left_quality=left.quality,
        right_quality=right.quality,
        timings=translate.timings_message(left.timings + right.timings),
    )
