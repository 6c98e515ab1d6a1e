import numpy as np
import pytest
import torch

from resight.encoder.model import IMAGENET_MEAN
from resight.training.adaptation.batches import AugmentSettings, erase, shift_and_flip


def ramp(count: int) -> np.ndarray:
    rows, columns = np.mgrid[1:65, 1:33]
    return np.repeat(np.stack([rows, columns, rows + columns], -1)[None].astype(np.uint8), count, axis=0)


def test_without_padding_and_flips_pixels_are_unchanged() -> None:
    out = shift_and_flip(ramp(3), AugmentSettings(flip=0, pad=0), np.random.default_rng(0))
    assert np.array_equal(out, ramp(3))


def test_a_certain_flip_mirrors_columns() -> None:
    out = shift_and_flip(ramp(2), AugmentSettings(flip=1, pad=0), np.random.default_rng(0))
    assert np.array_equal(out, ramp(2)[:, :, ::-1])


def test_a_shifted_crop_is_a_window_of_the_zero_padded_image() -> None:
    settings = AugmentSettings(flip=0, pad=16)  # at 64 rows: 4 pixels
    padded = np.pad(ramp(1)[0], ((4, 4), (4, 4), (0, 0)))
    windows = [padded[top : top + 64, left : left + 32] for top in range(9) for left in range(9)]
    seen = set()
    for image in shift_and_flip(ramp(200), settings, np.random.default_rng(1)):
        found = [i for i, window in enumerate(windows) if np.array_equal(window, image)]
        assert found
        seen.add(found[0])
    assert len(seen) > 60


def test_erasing_fills_one_rectangle_of_the_stated_area_with_the_imagenet_mean() -> None:
    images = erase(torch.full((300, 3, 64, 32), 9.0), AugmentSettings(erase=1.0), np.random.default_rng(2))
    for image in images:
        hole = image[0] != 9.0
        rows, columns = torch.where(hole)
        height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert int(hole.sum()) == height * width
        assert 0.015 < hole.float().mean() < 0.42  # 0.02-0.40 before sides are rounded to pixels
        for channel, mean in enumerate(IMAGENET_MEAN):
            assert image[channel][hole] == pytest.approx(mean)


def test_about_half_of_the_images_are_erased() -> None:
    images = erase(torch.full((1000, 3, 32, 16), 9.0), AugmentSettings(), np.random.default_rng(3))
    assert 0.42 < (images != 9.0).flatten(1).any(1).float().mean() < 0.58


@pytest.mark.parametrize("ends", [(0, 12), (0, 5), (5, 12), (3, 4)])
def test_a_part_of_a_batch_is_augmented_as_in_the_whole_batch(ends: tuple[int, int]) -> None:
    settings, part = AugmentSettings(pad=16), slice(*ends)
    images = np.random.default_rng(0).integers(0, 256, (12, 64, 32, 3), np.uint8)
    moving, alone = np.random.default_rng(1), np.random.default_rng(1)
    for _ in range(2):  # the random stream advances as for the whole batch
        whole = shift_and_flip(images, settings, moving)
        assert np.array_equal(shift_and_flip(images[part], settings, alone, batch=12, start=ends[0]), whole[part])
    erasing, alone = np.random.default_rng(2), np.random.default_rng(2)
    for _ in range(2):
        tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        found = erase(tensor[part].clone(), settings, alone, batch=12, start=ends[0])
        assert torch.equal(found, erase(tensor.clone(), settings, erasing)[part])
