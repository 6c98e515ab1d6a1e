"""All errors that resight raises for its users.

    ReIDError
    ├── InputError                 the input cannot be used; the caller can correct it
    │   ├── ImageError
    │   │   ├── ImageUndecodableError
    │   │   ├── ImageTooLargeError
    │   │   ├── ImageTooSmallError
    │   │   └── QualityTooLowError
    │   ├── SiteError              a folder of crops is missing, empty or lacks what is needed
    │   ├── WeightsError           initial weights do not fit the encoder
    │   ├── FootageError           footage is missing, cannot be read, or has no known start time
    │   ├── DetectorError          a person detector, or a file of boxes, cannot be used
    │   ├── RecipeError            a recipe or setting is unknown or out of range
    │   └── LimitError             a count or size outside its published limits
    ├── FormatError                a resight file is damaged, altered or newer than this program
    │   ├── CheckpointError
    │   ├── BundleError
    │   └── StoreError
    ├── TrainingError              the adaptation cannot continue (no cluster, one cluster, NaN)
    ├── ModelError                 the served model failed on this input
    ├── ModelInUseError            a model in use would be unloaded or changed
    ├── CropsMissingError          crops are needed that were not stored
    ├── MigrationError             a migration did not pass its gate
    ├── SpaceMismatchError         features of two embedding spaces would be compared
    ├── NotCancellableError        an operation of a kind that cannot be cancelled
    ├── UncalibratedError          a probability is requested of a space without a calibration
    ├── NotFoundError
    │   ├── CollectionNotFoundError
    │   ├── EntryNotFoundError
    │   ├── FeedbackNotFoundError
    │   ├── ModelNotFoundError
    │   ├── OperationNotFoundError
    │   └── ShadowNotFoundError
    ├── AlreadyExistsError
    │   ├── CollectionExistsError
    │   └── EntryExistsError
    ├── ConflictError              a compare-and-swap was lost
    ├── CollectionNotEmptyError
    ├── CollectionFullError
    ├── FeedbackConflictError      feedback on two entries contradicts earlier feedback
    ├── DeleteCapError             a deletion would take more than the caller allowed
    ├── OverloadedError            try again after `retry_after_s`
    │   └── RateLimitedError
    ├── UnauthenticatedError       no credential, or an unknown one
    ├── PermissionDeniedError      the credential's role does not permit the call
    ├── DeadlineError              the caller's deadline passed before the work was done
    │   ├── ExpiredInQueueError
    │   └── RevisionNotSearchableError
    ├── UnavailableError           starting, or the server cannot be reached
    │   ├── DrainingError
    │   └── ModelNotReadyError
    ├── StorageFullError
    │   └── DiskWatermarkError
    ├── StartupError               a port or a data folder is taken
    ├── CycleError                 the cycle of a site cannot continue
    └── CycleBusyError             another process runs the cycle of that site

Messages state what was expected, what was found and what to do next. `field` names the invalid part of a request
(``requests[3].image.data``), `facts` holds machine-readable details.
"""

from __future__ import annotations


class ReIDError(Exception):
    """Base class of all errors. ``facts`` are machine-readable details such as limits and ids."""

    def __init__(self, message: str, *, field: str = "", **facts: object) -> None:
        super().__init__(message)
        self.field = field
        self.facts: dict[str, str] = {name: str(value) for name, value in facts.items()}


class InputError(ReIDError):
    """The input cannot be used."""


class ImageError(InputError):
    """An image cannot be used as a crop."""


class ImageUndecodableError(ImageError):
    """Not a JPEG, PNG or WebP still image, or damaged."""


class ImageTooLargeError(ImageError):
    """More bytes or pixels than the limit; nothing was decoded."""


class ImageTooSmallError(ImageError):
    """A side shorter than the limit."""


class QualityTooLowError(ImageError):
    """A crop's quality is below the minimum of the collection."""


class SiteError(InputError):
    """A folder of crops is missing, empty or lacks what is needed."""


class WeightsError(InputError):
    """Initial weights cannot be read or do not fit the encoder."""


class FootageError(InputError):
    """Footage is missing, cannot be read, or has no known start time."""


class DetectorError(InputError):
    """A person detector, or a file of boxes, cannot be used."""


class RecipeError(InputError):
    """A recipe, or one of its settings, is unknown or out of range."""


class LimitError(InputError):
    """A count or size outside its published limits."""


class FormatError(ReIDError):
    """A resight file is damaged, altered or of another version."""


class CheckpointError(FormatError):
    """A checkpoint cannot be read or does not fit."""


class BundleError(FormatError):
    """A bundle is damaged, altered or fails its own probes."""


class StoreError(FormatError):
    """A crop store or gallery store is damaged or of another version."""


class TrainingError(ReIDError):
    """The adaptation cannot continue."""


class ModelError(ReIDError):
    """The served model failed on this input, or returned an invalid feature."""


class ModelInUseError(ReIDError):
    """A model that is active or needed by a migration would be unloaded or change its space."""


class CropsMissingError(ReIDError):
    """Crops are needed, for another model or for training, but were not stored."""


class MigrationError(ReIDError):
    """A migration did not pass its checks; the collection is searched as before."""


class SpaceMismatchError(ReIDError):
    """Features of two embedding spaces would be compared."""


class NotCancellableError(ReIDError):
    """An operation of a kind that cannot be cancelled."""


class UncalibratedError(ReIDError):
    """A probability is requested of an embedding space without a calibration."""


class NotFoundError(ReIDError):
    """A named resource does not exist."""


class CollectionNotFoundError(NotFoundError):
    """No collection of that name."""


class EntryNotFoundError(NotFoundError):
    """No entry of that id in the collection."""


class FeedbackNotFoundError(NotFoundError):
    """There is no feedback on these two entries."""


class ModelNotFoundError(NotFoundError):
    """No model of that id is loaded."""


class OperationNotFoundError(NotFoundError):
    """No long operation of that id."""


class ShadowNotFoundError(NotFoundError):
    """No model has shadowed the collection."""


class AlreadyExistsError(ReIDError):
    """A resource of that name already exists."""


class CollectionExistsError(AlreadyExistsError):
    """A collection of that name exists."""


class EntryExistsError(AlreadyExistsError):
    """An entry of that id exists in the collection."""


class ConflictError(ReIDError):
    """The resource was changed concurrently."""


class CollectionNotEmptyError(ReIDError):
    """A collection that has entries is deleted only with ``force``."""


class CollectionFullError(ReIDError):
    """A collection has reached its maximum number of entries."""


class FeedbackConflictError(ReIDError):
    """Feedback on two entries contradicts earlier feedback on others; nothing was stored."""


class DeleteCapError(ReIDError):
    """A deletion would remove more entries than the caller allowed; nothing was deleted."""


class OverloadedError(ReIDError):
    """The queue is full; nothing was started."""

    def __init__(self, message: str, *, retry_after_s: float, field: str = "", **facts: object) -> None:
        super().__init__(message, field=field, **facts)
        self.retry_after_s = retry_after_s


class RateLimitedError(OverloadedError):
    """The caller has exceeded its rate limit; nothing was started."""


class UnauthenticatedError(ReIDError):
    """The call carried no credential, or one that is unknown, expired or revoked."""


class PermissionDeniedError(ReIDError):
    """The credential is valid, but its role does not permit the call."""


class DeadlineError(ReIDError):
    """The caller's deadline passed before the work was done."""


class ExpiredInQueueError(DeadlineError):
    """The deadline passed while the request was queued; nothing was started."""


class RevisionNotSearchableError(DeadlineError):
    """The revision that a search waited for was not committed before the deadline."""


class UnavailableError(ReIDError):
    """The server is starting or cannot be reached."""


class DrainingError(UnavailableError):
    """The server is shutting down."""


class ModelNotReadyError(UnavailableError):
    """The model is being loaded."""


class StorageFullError(ReIDError):
    """The disk has no room for the write; nothing was acknowledged."""


class DiskWatermarkError(StorageFullError):
    """The disk is nearly full: writes are rejected, reads and deletions continue."""


class StartupError(ReIDError):
    """The server cannot start: a port or a data folder is taken."""


class CycleError(ReIDError):
    """The cycle of a site cannot continue: a stage failed, or its output cannot be read."""


class CycleBusyError(ReIDError):
    """Another process runs the cycle of that site."""
