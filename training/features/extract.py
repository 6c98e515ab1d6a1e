"""Feature extraction: crops are decoded ahead in a thread, and an encoder is applied to a whole store.

Letters: N crops, B batch, D feature size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch

from resight.arrays import Floats, Ints, Pixels
from resight.encoder.model import Encoder
from resight.errors import ImageError, RecipeError
from resight.image import ImageSpec, decode, fit
from resight.training.features.distributed import gather_slices, local_slice, shared_errors
from resight.training.store.crops import CropStore


def require_device(device: str) -> None:
    """Check that this machine can compute on a device.

    Raises:
        RecipeError: not the name of a device, or a GPU that is not available.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"cannot compute on device {device!r} ({str(error).splitlines()[0]}): expected cpu, or cuda on a machine "
            "with an NVIDIA GPU and its driver",
            field="device",
        ) from error


Precision = Literal["auto", "bf16", "fp16", "fp32"]


EXTRACTION_BATCH = 64  # larger batches are no faster on a CPU and need more memory for 256 x 128 crops
CACHE_BYTES = 1 << 30  # 10,922 crops of 256 x 128


class PixelCache:
    """Decoded and resized crops in memory: every epoch reads each crop once for labels and about once for training.

    On a CPU decoding and resizing take a sixth of the time of OSNet x0.25. Crops beyond the limit are decoded again.
    """

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self._pixels: dict[tuple[ImageSpec, int], Pixels] = {}
        self._free_bytes = limit_bytes

    def fetch(self, spec: ImageSpec, row: int, read: Callable[[int], Pixels]) -> Pixels:
        """The pixels of a row, from the cache or read now; must not be modified."""
        found = self._pixels.get((spec, row))
        if found is None:
            found = read(row)
            if found.nbytes <= self._free_bytes:
                self._free_bytes -= found.nbytes
                self._pixels[spec, row] = found
        return found


def read_batches(
    store: CropStore,
    rows: Iterable[Ints],
    spec: ImageSpec,
    *,
    cache: PixelCache | None = None,
    part: Callable[[int], slice] = slice,
    transform: Callable[[Pixels], Pixels] = lambda pixels: pixels,
    ahead: int = 2,
) -> Iterator[tuple[Ints, Pixels]]:
    """Decode and fit batches in the background while the caller computes.

    Args:
        store: where crops are read from.
        rows: rows of each batch, in order.
        spec: size to fit to.
        cache: used only with this store.
        part: the part of a batch of B to read; all of it by default.
        transform: applied to each batch in the background, in order of the batches.
        ahead: batches prepared in advance.

    Yields:
        rows of the whole batch and uint8 (B, H, W, 3) of its part, in the order of ``rows``.

    Raises:
        ImageError: a crop cannot be decoded, with its path; `check_crops` finds such crops beforehand.
    """
    pixel_cache = cache or PixelCache(0)

    def read(row: int) -> Pixels:
        try:
            return fit(decode(store.read(row)), spec)
        except ImageError as error:
            raise type(error)(f"{store.root / store.paths[row]}: {error}") from error

    def load(batch: Ints) -> Pixels:
        return transform(np.stack([pixel_cache.fetch(spec, int(row), read) for row in batch[part(len(batch))]]))

    # One thread: Pillow keeps up with the encoder on any CPU, and transforms in order make random numbers reproducible.
    with ThreadPoolExecutor(1, thread_name_prefix="crops") as pool:
        pending: deque[tuple[Ints, Future[Pixels]]] = deque()
        for batch in rows:
            pending.append((batch, pool.submit(load, batch)))
            if len(pending) > ahead:
                ready, pixels = pending.popleft()
                yield ready, pixels.result()
        while pending:
            ready, pixels = pending.popleft()
            yield ready, pixels.result()


def autocast(device: str, precision: Precision) -> torch.autocast:
    """The autocast context of an encoder; "auto" selects bfloat16 if it is native.

    Raises:
        RecipeError: "fp16" on a CPU, which has no float16 units.
    """
    kind = torch.device(device).type
    if precision == "fp16":
        if kind != "cuda":
            raise RecipeError(
                f"precision fp16 needs a GPU, found device {device}: use auto, bf16 or fp32", field="precision"
            )
        return torch.autocast(kind, torch.float16)
    native = torch.cuda.is_bf16_supported() if kind == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16" or (precision == "auto" and bool(native)))


def to_input(encoder: Encoder, pixels: Pixels, device: str) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> normalised float32 (B, 3, H, W), channels last: twice as fast for OSNet on a CPU."""
    images = encoder.normalise(torch.from_numpy(pixels).to(device))
    return images.contiguous(memory_format=torch.channels_last)


def extract_features(
    encoder: Encoder,
    store: CropStore,
    *,
    device: str = "cpu",
    precision: Precision = "fp32",
    local: bool = True,
    cache: PixelCache | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Floats]:
    """Features of every crop of a store; the encoder runs in eval mode and its mode is restored.

    Several processes (see `distributed`) compute a slice each and all receive the complete result.

    Args:
        encoder: on ``device``.
        store: N crops.
        device: device of the computation.
        precision: see `autocast`.
        local: whether to return the local views too.
        cache: see `read_batches`.
        progress: called with the number of crops just done.

    Returns:
        One float32 (N, D) array of unit rows per view: global, then the local ones if requested.
    """
    training = encoder.training
    encoder.eval()
    rows = np.arange(len(store))[local_slice(len(store))]
    batches = np.array_split(rows, max(1, -(-len(rows) // EXTRACTION_BATCH)))
    done: list[list[torch.Tensor]] = []
    with shared_errors(), torch.inference_mode(), autocast(device, precision):
        for _, pixels in read_batches(store, batches, encoder.config.image, cache=cache):
            images = to_input(encoder, pixels, device)
            views = encoder(images) if local else [encoder.embed(images)]
            done.append([view.cpu() for view in views])
            progress(len(pixels))
    encoder.train(training)
    return [gather_slices(torch.cat(parts), len(store)).numpy() for parts in zip(*done, strict=True)]


def embed_store(store: CropStore, spec: ImageSpec, embed: Callable[[Pixels], Floats], *, flip: bool = False) -> Floats:
    """Features of every crop of a store.

    Args:
        store: N crops.
        spec: input size of the model.
        embed: uint8 (B, H, W, 3) -> float32 (B, D), unit rows.
        flip: whether to average each feature with that of the mirrored crop (normalised to unit length).

    Returns:
        float32 (N, D), unit rows.

    Raises:
        ImageError: a crop cannot be decoded, with its path.
    """
    batches = np.array_split(np.arange(len(store)), max(1, -(-len(store) // EXTRACTION_BATCH)))
    done = []
    for _, pixels in read_batches(store, batches, spec):
        features = embed(pixels)
        if flip:
            both = features + embed(np.ascontiguousarray(pixels[:, :, ::-1]))
            features = both / np.linalg.norm(both, axis=1, keepdims=True)
        done.append(features)
    return np.concatenate(done)


def encoder_embedding(encoder: Encoder, device: str) -> Callable[[Pixels], Floats]:
    """An encoder as the `embed` function of `embed_store`, in eval mode and float32.

    Args:
        encoder: on ``device``.
        device: device of the computation.
    """
    encoder.eval()

    def embed(pixels: Pixels) -> Floats:
        with torch.inference_mode():
            features: Floats = encoder.embed(to_input(encoder, pixels, device)).cpu().numpy()
        return features

    return embed
