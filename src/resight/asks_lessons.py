"""The calls about what a site's next model learns from, as those in `resight.asks`: verdicts on pairs, kept crops."""

from __future__ import annotations

from datetime import datetime
from uuid import uuid4

from resight import replies
from resight.answers import Feedback, KeptCrops
from resight.calls import Ask, Listing, Resuming, Road
from resight.questions import Where
from resight.v1 import gallery_pb2


def confirm(collection: str, entry_id: str, other_entry_id: str) -> Road[Feedback]:
    """Say that two entries of a collection show one person.

    Raises:
        FeedbackConflictError: what was said of other pairs contradicts it; the message names them.
    """
    return _told(collection, entry_id, other_entry_id, gallery_pb2.FEEDBACK_VERDICT_SAME_PERSON)


def reject(collection: str, entry_id: str, other_entry_id: str) -> Road[Feedback]:
    """Say that two entries of a collection show two people; raises as `confirm`."""
    return _told(collection, entry_id, other_entry_id, gallery_pb2.FEEDBACK_VERDICT_DIFFERENT_PERSON)


def _told(collection: str, one: str, other: str, verdict: gallery_pb2.FeedbackVerdict.ValueType) -> Road[Feedback]:
    request = gallery_pb2.AddFeedbackRequest(
        collection_id=collection, entry_id=one, other_entry_id=other, verdict=verdict, request_id=str(uuid4())
    )
    return replies.feedback((yield Ask("gallery.AddFeedback", request)).feedback)


def list_feedback(collection: str) -> Listing[Feedback]:
    """What was said of a collection's entries, in the order in which the pairs were first told."""
    ask = Ask("gallery.ListFeedback", gallery_pb2.ListFeedbackRequest(collection_id=collection, page_size=1000))
    return Listing(ask, lambda page: [replies.feedback(one) for one in page.feedback])


def remove_feedback(collection: str, entry_id: str, other_entry_id: str, *, allow_missing: bool = False) -> Road[None]:
    """Take back what was said of two entries."""
    request = gallery_pb2.RemoveFeedbackRequest(
        collection_id=collection, entry_id=entry_id, other_entry_id=other_entry_id, allow_missing=allow_missing
    )
    yield Ask("gallery.RemoveFeedback", request, retry=allow_missing)


def stream_crops(
    collection: str,
    *,
    where: Where | None = None,
    cursor: str = "",
    since: datetime | None = None,
    timeout_s: float | None = None,
) -> Resuming[KeptCrops]:
    """The crops that a collection keeps, in order of enrolment; what was enrolled when this begins.

    Args:
        collection: its name.
        where: only of entries that pass.
        cursor: of the last answer taken, to go on behind it; empty = from the beginning.
        since: only enrolled then or later.
        timeout_s: of one try; None = as long as it takes. When the server goes away, the next try goes on.

    Raises:
        CropsMissingError: the collection keeps no crops.
    """
    request = gallery_pb2.StreamCropsRequest(
        collection_id=collection, filter=(where or Where()).message(), cursor=cursor
    )
    if since is not None:
        request.enrolled_since.FromDatetime(since)
    return Resuming("gallery.StreamCrops", request, replies.kept_crops, timeout_s)
