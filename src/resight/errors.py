"""Every error a user of resight can meet.

    ReIDError
    ├── InputError                 what was handed in cannot be used; the caller can mend it
    │   ├── ImageError
    │   │   ├── ImageUndecodableError
    │   │   ├── ImageTooLargeError
    │   │   ├── ImageTooSmallError
    │   │   └── QualityTooLowError
    │   ├── SiteError              a folder of crops is missing, empty or lacks what is needed
    │   ├── WeightsError           initial weights do not fit the encoder
    │   ├── FootageError           footage is missing, cannot be read, or nobody knows when it was taken
    │   ├── DetectorError          a person detector, or boxes from elsewhere, cannot be used
    │   ├── RecipeError            a recipe or setting is unknown or out of range
    │   └── LimitError             a count or size outside its published limits
    ├── FormatError                a file of ours is damaged, altered or newer than this program
    │   ├── CheckpointError
    │   ├── BundleError
    │   └── StoreError
    ├── TrainingError              the adaptation cannot go on (no cluster, one cluster, NaN)
    ├── ModelError                 the served model failed on this input
    ├── ModelInUseError            a model that is needed would go or change
    ├── CropsMissingError          crops are needed that were never kept
    ├── MigrationError             a migration did not pass its gate
    ├── SpaceMismatchError         features of two embedding spaces would be compared
    ├── NotCancellableError        long work of a kind that nothing stops
    ├── UncalibratedError          a probability is asked of a space that knows none
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
    ├── FeedbackConflictError      a verdict on two entries that earlier ones contradict
    ├── DeleteCapError             a deletion would take more than the caller allowed
    ├── OverloadedError            try again after `retry_after_s`
    │   └── RateLimitedError
    ├── UnauthenticatedError       no credential, or one the server does not know
    ├── PermissionDeniedError      a credential whose role is too small for the call
    ├── DeadlineError              the caller's deadline passed before the work was done
    │   ├── ExpiredInQueueError
    │   └── RevisionNotSearchableError
    ├── UnavailableError           starting, or the server cannot be reached
    │   ├── DrainingError
    │   └── ModelNotReadyError
    ├── StorageFullError
    │   └── DiskWatermarkError
    ├── StartupError               a port or a data folder is taken
    ├── CycleError                 the cycle of a site cannot go on
    └── CycleBusyError             another process works on that site

Messages say what was expected, what was found and what to do next. `field` names the part of a
request at fault (``requests[3].image.data``), `facts` carries figures a program can read.
"""

from __future__ import annotations


class ReIDError(Exception):
    """Root of the tree. ``facts`` are machine-readable details such as limits and ids."""

    def __init__(self, message: str, *, field: str = "", **facts: object) -> None:
        super().__init__(message)
        self.field = field
        self.facts: dict[str, str] = {name: str(value) for name, value in facts.items()}


class InputError(ReIDError):
    """What was handed in cannot be used."""


class ImageError(InputError):
    """An image cannot be used as a crop."""


class ImageUndecodableError(ImageError):
    """Not a JPEG, PNG or WebP still image, or damaged."""


class ImageTooLargeError(ImageError):
    """More bytes or pixels than the limit; nothing was decoded."""


class ImageTooSmallError(ImageError):
    """A side shorter than the limit."""


class QualityTooLowError(ImageError):
    """A crop tells less than the collection asks of what is enrolled."""


class SiteError(InputError):
    """A folder of crops is missing, empty or lacks what is needed."""


class WeightsError(InputError):
    """Initial weights cannot be read or do not fit the encoder."""


class FootageError(InputError):
    """Footage is missing, cannot be read, or nobody knows when it was taken."""


class DetectorError(InputError):
    """A person detector, or a file of boxes from elsewhere, cannot be used."""


class RecipeError(InputError):
    """A recipe, or one of its settings, is unknown or out of range."""


class LimitError(InputError):
    """A count or size outside its published limits."""


class FormatError(ReIDError):
    """A file of ours is damaged, altered or of another version."""


class CheckpointError(FormatError):
    """A checkpoint cannot be read or does not fit."""


class BundleError(FormatError):
    """A bundle is damaged, altered or fails its own probes."""


class StoreError(FormatError):
    """A crop store or gallery store is damaged or of another version."""


class TrainingError(ReIDError):
    """The adaptation cannot go on."""


class ModelError(ReIDError):
    """The served model failed on this input, or answered what is no feature."""


class ModelInUseError(ReIDError):
    """A model that is active, or that a migration needs, would be unloaded or change its space."""


class CropsMissingError(ReIDError):
    """Crops are needed that were never kept: to embed entries with another model, or to learn from."""


class MigrationError(ReIDError):
    """A migration did not pass its gate; the collection is searched as before."""


class SpaceMismatchError(ReIDError):
    """Features of two embedding spaces would be compared."""


class NotCancellableError(ReIDError):
    """Long work of a kind that ends by itself and by nothing else."""


class UncalibratedError(ReIDError):
    """A probability is asked of an embedding space without a calibration."""


class NotFoundError(ReIDError):
    """Something named does not exist."""


class CollectionNotFoundError(NotFoundError):
    """No collection of that name."""


class EntryNotFoundError(NotFoundError):
    """No entry of that id in the collection."""


class FeedbackNotFoundError(NotFoundError):
    """Nobody said anything of these two entries, or it was taken back."""


class ModelNotFoundError(NotFoundError):
    """No model of that id is loaded."""


class OperationNotFoundError(NotFoundError):
    """No long operation of that id."""


class ShadowNotFoundError(NotFoundError):
    """No model has shadowed the collection."""


class AlreadyExistsError(ReIDError):
    """Something of that name exists."""


class CollectionExistsError(AlreadyExistsError):
    """A collection of that name exists."""


class EntryExistsError(AlreadyExistsError):
    """An entry of that id exists in the collection."""


class ConflictError(ReIDError):
    """Somebody changed it first."""


class CollectionNotEmptyError(ReIDError):
    """A collection that still has entries is deleted only by force."""


class CollectionFullError(ReIDError):
    """A collection holds as many entries as it may."""


class FeedbackConflictError(ReIDError):
    """A verdict on two entries contradicts what was said of others; nothing was stored."""


class DeleteCapError(ReIDError):
    """A deletion would take more entries than the caller allowed; nothing was deleted."""


class OverloadedError(ReIDError):
    """The queue is full; nothing was started."""

    def __init__(self, message: str, *, retry_after_s: float, field: str = "", **facts: object) -> None:
        super().__init__(message, field=field, **facts)
        self.retry_after_s = retry_after_s


class RateLimitedError(OverloadedError):
    """This caller has used up its share for now; nothing was started."""


class UnauthenticatedError(ReIDError):
    """The call carried no credential, or one that is unknown, expired or revoked."""


class PermissionDeniedError(ReIDError):
    """The credential is good, and its role too small for the call."""


class DeadlineError(ReIDError):
    """The caller's deadline passed before the work was done."""


class ExpiredInQueueError(DeadlineError):
    """The deadline passed while the work waited; nothing was started."""


class RevisionNotSearchableError(DeadlineError):
    """The write a search was to wait for was not committed before the deadline."""


class UnavailableError(ReIDError):
    """The server is starting or out of reach."""


class DrainingError(UnavailableError):
    """The server is shutting down."""


class ModelNotReadyError(UnavailableError):
    """The model is being loaded."""


class StorageFullError(ReIDError):
    """The disk has no room for the write; nothing was acknowledged."""


class DiskWatermarkError(StorageFullError):
    """So little room is left on the disk that writes are refused before it is full; reads and deletions go on."""


class StartupError(ReIDError):
    """The server cannot start: a port or a data folder is taken."""


class CycleError(ReIDError):
    """The cycle of a site cannot go on: a stage failed, or what it left cannot be read."""


class CycleBusyError(ReIDError):
    """Another process works on that site."""
