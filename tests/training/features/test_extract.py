from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resight.encoder.model import Encoder, EncoderConfig
from resight.errors import ImageError, StoreError
from resight.image import ImageSpec, decode, fit
from resight.training.features.extract import PixelCache, extract_features, read_batches, to_input
from resight.training.store.crops import CropStore

SPEC = ImageSpec(64, 32)


@pytest.fixture
def store(tmp_path: Path) -> CropStore:
    rng = np.random.default_rng(0)
    names = []
    for i in range(70):
        Image.fromarray(rng.integers(0, 256, (80 + i, 40, 3), np.uint8)).save(tmp_path / f"{i}.jpg")
        names.append(f"{i}.jpg")
    unknown = np.full(70, -1)
    return CropStore(tmp_path, tuple(names), np.zeros(70, np.int64), ("a",), np.full(70, np.nan), unknown, unknown)


def test_batches_come_in_order_with_the_pixels_of_image_fit(store: CropStore) -> None:
    requested = [np.array([3, 1]), np.array([2]), np.array([5, 5, 69])]
    found = list(read_batches(store, requested, SPEC))
    assert [rows.tolist() for rows, _ in found] == [[3, 1], [2], [5, 5, 69]]
    for rows, pixels in found:
        for row, image in zip(rows, pixels, strict=True):
            assert np.array_equal(image, fit(decode(store.read(int(row))), SPEC))


def test_crops_are_cached_up_to_the_memory_limit(store: CropStore) -> None:
    rows = [np.array([3, 1]), np.array([1, 2])]
    cache = PixelCache(limit_bytes=2 * 64 * 32 * 3)
    first, again = (
        list(read_batches(store, rows, SPEC, cache=cache, transform=lambda pixels: pixels[:, ::-1])) for _ in range(2)
    )
    for (_, one), (_, other) in zip(first, again, strict=True):
        assert np.array_equal(one, other)
    for row in (1, 2, 3):
        (store.root / store.paths[row]).unlink()
    [(_, cached)] = read_batches(store, rows[:1], SPEC, cache=cache)
    assert np.array_equal(cached[:, ::-1], first[0][1])
    with pytest.raises(StoreError, match=r"2.jpg"):
        list(read_batches(store, rows[1:], SPEC, cache=cache))
    with pytest.raises(StoreError, match=r"3.jpg"):
        list(read_batches(store, rows[:1], ImageSpec(32, 32), cache=cache))  # another size


def test_background_transforms_run_in_order(store: CropStore) -> None:
    rng = np.random.default_rng(4)
    rows = [np.array([i]) for i in range(20)]
    added = [
        int(pixels[0, 0, 0, 0])
        for _, pixels in read_batches(
            store, rows, SPEC, transform=lambda pixels: np.full_like(pixels, rng.integers(0, 256))
        )
    ]
    again = np.random.default_rng(4)
    assert added == [int(again.integers(0, 256)) for _ in range(20)]


def test_a_corrupt_crop_is_an_error(store: CropStore) -> None:
    (store.root / "7.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError):
        list(read_batches(store, [np.arange(10)], SPEC))


def test_features_equal_those_of_single_crops_in_row_order(store: CropStore) -> None:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(embedding_dim=24, image=SPEC)).train()
    views = extract_features(encoder, store)
    assert [view.shape for view in views] == [(70, 24)] * 3 and encoder.training
    encoder.eval()
    for row in (0, 33, 69):
        pixels = fit(decode(store.read(row)), SPEC)[None]
        with torch.inference_mode():
            alone = encoder(to_input(encoder, pixels, "cpu"))
        for view, single in zip(views, alone, strict=True):
            assert float(view[row] @ single[0].numpy()) > 0.9999
    assert np.allclose(extract_features(encoder, store, local=False)[0], views[0], atol=1e-5)


def test_progress_counts_every_crop(store: CropStore) -> None:
    seen: list[int] = []
    extract_features(Encoder(EncoderConfig(embedding_dim=8, image=SPEC)), store, progress=seen.append)
    assert sum(seen) == 70
