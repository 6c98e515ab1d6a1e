"""Crops to pixels to features: reading ahead in threads, and a whole store through an encoder.

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
    """Refuse a device this machine cannot compute on.

    Raises:
        RecipeError: not a device's name, or a GPU that is not there.
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


EXTRACTION_BATCH = 64  # beyond it a CPU gains nothing and a map of 256 x 128 crops costs memory
CACHE_BYTES = 1 << 30  # 10,922 crops of 256 x 128


class PixelCache:
    """Fitted crops in memory: every epoch reads each to label it and about once more to train, from the same files.

    Decoding and fitting cost a CPU a sixth of what OSNet x0.25 costs it. Crops beyond the limit are decoded anew.
    """

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self._kept: dict[tuple[ImageSpec, int], Pixels] = {}
        self._free_bytes = limit_bytes

    def fetch(self, spec: ImageSpec, row: int, read: Callable[[int], Pixels]) -> Pixels:
        """The pixels of a row, kept or read now. Not to be written to."""
        found = self._kept.get((spec, row))
        if found is None:
            found = read(row)
            if found.nbytes <= self._free_bytes:
                self._free_bytes -= found.nbytes
                self._kept[spec, row] = found
        return found


def read_batches(
    store: CropStore,
    rows: Iterable[Ints],
    spec: ImageSpec,
    *,
    cache: PixelCache | None = None,
    part: Callable[[int], slice] = slice,
    then: Callable[[Pixels], Pixels] = lambda pixels: pixels,
    ahead: int = 2,
) -> Iterator[tuple[Ints, Pixels]]:
    """Decode and fit batches in the background while the caller computes.

    Args:
        store: where crops are read from.
        rows: rows of each batch, in order.
        spec: size to fit to.
        cache: of this very store.
        part: which part of a batch of B is read; all of it by default.
        then: applied to each batch in the background, in order of the batches.
        ahead: batches prepared in advance.

    Yields:
        rows of the whole batch and uint8 (B, H, W, 3) of its part, in the order of ``rows``.

    Raises:
        ImageError: a crop cannot be decoded, with its path; `check_crops` finds those beforehand.
    """
    kept = cache or PixelCache(0)

    def read(row: int) -> Pixels:
        try:
            return fit(decode(store.read(row)), spec)
        except ImageError as error:
            raise type(error)(f"{store.root / store.paths[row]}: {error}") from error

    def load(batch: Ints) -> Pixels:
        return then(np.stack([kept.fetch(spec, int(row), read) for row in batch[part(len(batch))]]))

    # One thread: Pillow alone keeps up with any CPU and `then` stays in order, so chance is repeatable.
    with ThreadPoolExecutor(1, thread_name_prefix="crops") as pool:
        waiting: deque[tuple[Ints, Future[Pixels]]] = deque()
        for batch in rows:
            waiting.append((batch, pool.submit(load, batch)))
            if len(waiting) > ahead:
                ready, pixels = waiting.popleft()
                yield ready, pixels.result()
        while waiting:
            ready, pixels = waiting.popleft()
            yield ready, pixels.result()


def autocast(device: str, precision: Precision) -> torch.autocast:
    """The context in which an encoder computes; "auto" takes bfloat16 where it is native.

    Raises:
        RecipeError: "fp16" on a CPU, where gradients would have to be scaled for nothing: it has no such units.
    """
    kind = torch.device(device).type
    if precision == "fp16":
        if kind != "cuda":
            raise RecipeError(
                f"precision fp16 needs a GPU, found device {device}: take auto, bf16 or fp32", field="precision"
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
    """Features of every crop of a store, the encoder in eval mode and put back afterwards.

    Several processes (see `distributed`) compute a share each and all receive the whole.

    Args:
        encoder: on ``device``.
        store: N crops.
        device: where to compute.
        precision: see `autocast`.
        local: whether the upper and lower views are wanted too.
        cache: see `read_batches`.
        progress: called with the number of crops just done.

    Returns:
        One float32 (N, D) array of unit rows per view: global, then upper and lower if wanted.
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
        spec: the size the model wants.
        embed: uint8 (B, H, W, 3) -> float32 (B, D), unit rows.
        flip: whether each feature is the mean of the crop's and its mirror image's, made length 1.

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
    """An encoder as `embed_store` wants it, in eval mode and in float32.

    Args:
        encoder: on ``device``.
        device: where it computes.
    """
    encoder.eval()

    def embed(pixels: Pixels) -> Floats:
        with torch.inference_mode():
            features: Floats = encoder.embed(to_input(encoder, pixels, device)).cpu().numpy()
        return features

    return embed
