import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resight.errors import SiteError, StoreError
from resight.training.store.crops import INDEX_FILE, UNKNOWN, CropStore
from resight.training.store.datasets import SEQUENCE_S, open_site

SHARED = Path(__file__).resolve().parents[4] / "shared"
JPEG_OF = {}


def fill(root: Path, paths: Iterable[str]) -> Path:
    """Write small JPEGs under these paths."""
    if not JPEG_OF:
        Image.new("RGB", (32, 64), (90, 120, 30)).save(root / "model.jpg")
        JPEG_OF["data"] = (root / "model.jpg").read_bytes()
        (root / "model.jpg").unlink()
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(JPEG_OF["data"])
    return root


def cameras(store: CropStore) -> list[str]:
    return [store.camera_names[camera] for camera in store.cameras]


def check_query_and_gallery(query: CropStore | None, gallery: CropStore | None) -> tuple[CropStore, CropStore]:
    """Every query has a match in another camera, and no crop is in both."""
    assert query is not None and gallery is not None
    for person, camera in zip(query.persons, query.cameras, strict=True):
        assert ((gallery.persons == person) & (gallery.cameras != camera)).any()
    assert not set(query.paths) & set(gallery.paths)
    return query, gallery


def test_a_market_folder_is_read_by_its_names(tmp_path: Path) -> None:
    root = fill(
        tmp_path,
        [
            "bounding_box_train/0002_c1s1_000451_03.jpg",
            "bounding_box_train/0002_c2s3_000050_01.jpg",
            "bounding_box_train/-1_c1s1_000460_01.jpg",
            "query/0010_c10s1_000025_00.jpg",
            "bounding_box_test/0000_c2s1_000001_00.jpg",
            "bounding_box_test/0010_c2s1_000075_00.jpg",
            "bounding_box_test/-1_c2s1_000075_00.jpg",
        ],
    )
    for name in ("Thumbs.db", "readme.txt", ".hidden.jpg"):
        (root / "bounding_box_train" / name).write_text("no crop")
    site = open_site(root)
    query, gallery = check_query_and_gallery(site.query, site.gallery)
    assert site.name == root.name and site.root == root
    assert site.train.paths == (
        "bounding_box_train/0002_c1s1_000451_03.jpg",
        "bounding_box_train/0002_c2s3_000050_01.jpg",
    )
    assert site.train.camera_names == query.camera_names == gallery.camera_names == ("c1", "c2", "c10")
    assert cameras(site.train) == ["c1", "c2"] and cameras(query) == ["c10"] and cameras(gallery) == ["c2", "c2"]
    assert site.train.persons.tolist() == [2, 2] and gallery.persons.tolist() == [0, 10]
    assert site.train.times_s.tolist() == [SEQUENCE_S + 451 / 25, 3 * SEQUENCE_S + 2]
    assert site.train.tracks.tolist() == [UNKNOWN, UNKNOWN]


def test_market_names_without_a_sequence_have_no_time(tmp_path: Path) -> None:
    site = open_site(fill(tmp_path, ["bounding_box_train/0000_c1_0001.jpg", "bounding_box_train/1040_c15_0030.png"]))
    assert cameras(site.train) == ["c1", "c15"] and site.train.persons.tolist() == [0, 1040]
    assert np.isnan(site.train.times_s).all() and site.query is None and site.gallery is None


@pytest.mark.parametrize(
    "name",
    ["portrait.jpg", "0002.jpg", "0002_s1_000451.jpg", "-2_c1s1_000451_03.jpg", "0002_c1x.jpg", f"{'9' * 30}_c1.jpg"],
)
def test_a_market_folder_with_another_name_in_it_is_refused(tmp_path: Path, name: str) -> None:
    fill(tmp_path, ["bounding_box_train/0002_c1s1_000451_03.jpg", f"bounding_box_train/{name}"])
    with pytest.raises(SiteError, match=f"{name}: expected a name such as"):
        open_site(tmp_path)


@pytest.mark.parametrize("names", [[], ["-1_c1s1_000451_03.jpg"]])
def test_a_market_folder_without_a_usable_crop_is_refused(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "bounding_box_train").mkdir()
    fill(tmp_path, [f"bounding_box_train/{name}" for name in names])
    with pytest.raises(SiteError, match="has no usable crop"):
        open_site(tmp_path)


def test_one_folder_per_camera(tmp_path: Path) -> None:
    site = open_site(fill(tmp_path, ["cam10/b.jpg", "cam2/z.JPEG", "cam2/a.webp", "cam1/deep/er/x.png"]))
    assert site.train.camera_names == ("cam1", "cam2", "cam10")
    assert site.train.paths == ("cam1/deep/er/x.png", "cam10/b.jpg", "cam2/a.webp", "cam2/z.JPEG")
    assert cameras(site.train) == ["cam1", "cam10", "cam2", "cam2"]
    assert (site.train.persons == UNKNOWN).all() and np.isnan(site.train.times_s).all()
    assert site.query is None and site.gallery is None


def test_cameras_that_differ_only_in_leading_zeros_have_a_fixed_order(tmp_path: Path) -> None:
    assert open_site(fill(tmp_path, ["c1/a.jpg", "c01/a.jpg", "c001/a.jpg"])).train.camera_names == (
        "c001",
        "c01",
        "c1",
    )


def test_folders_of_people_in_folders_of_cameras(tmp_path: Path) -> None:
    names = [
        f"{camera}/{person}/{i}.jpg" for camera in ("in", "out") for person in ("anna", "bo", "cy") for i in range(3)
    ]
    site = open_site(fill(tmp_path, [*names, "in/dee/0.jpg", "in/dee/1.jpg"]))
    assert set(site.train.persons.tolist()) == {1, 2, 3, 4} and len(site.train) == 20
    query, gallery = check_query_and_gallery(site.query, site.gallery)
    assert query.persons.tolist() == [1, 2, 3, 1, 2, 3]  # dee was seen by one camera only
    assert len(gallery) == 14 and (gallery.persons == 4).sum() == 2
    assert query.paths[0] == "in/anna/0.jpg"


def test_people_with_one_crop_per_camera_keep_a_match_in_the_gallery(tmp_path: Path) -> None:
    site = open_site(fill(tmp_path, ["a/x/0.jpg", "b/x/0.jpg", "c/x/0.jpg", "a/y/0.jpg", "a/y/1.jpg", "b/y/0.jpg"]))
    query, gallery = check_query_and_gallery(site.query, site.gallery)
    assert query.paths == ("a/x/0.jpg", "a/y/0.jpg") and len(gallery) == 4


def test_some_crops_outside_of_a_persons_folder_leave_people_unknown(tmp_path: Path) -> None:
    site = open_site(fill(tmp_path, ["in/anna/0.jpg", "out/anna/0.jpg", "out/1.jpg"]))
    assert (site.train.persons == UNKNOWN).all() and site.query is None


def test_market_names_in_one_folder(tmp_path: Path) -> None:
    names = ["0001_c1s1_000025_00.jpg", "0001_c2s1_000050_00.jpg", "0001_c2s1_000075_00.jpg", "0000_c1s1_000001_00.jpg"]
    site = open_site(fill(tmp_path, [*names, "-1_c1s1_000001_00.jpg", "0000_c2s1_000001_00.jpg"]))
    assert len(site.train) == 5 and site.train.camera_names == ("c1", "c2")
    query, gallery = check_query_and_gallery(site.query, site.gallery)
    assert query.persons.tolist() == [1] and sorted(gallery.persons.tolist()) == [0, 0, 1, 1]
    assert site.train.times_s.tolist()[::2] == [SEQUENCE_S + 1 / 25, SEQUENCE_S + 1, SEQUENCE_S + 3]


def test_one_camera_can_be_used_for_adaptation_but_not_for_evaluation(tmp_path: Path) -> None:
    site = open_site(fill(tmp_path, ["door/anna/0.jpg", "door/anna/1.jpg", "door/bo/0.jpg"]))
    assert site.train.camera_names == ("door",) and site.train.has_persons
    assert site.query is None and site.gallery is None


def test_crops_without_camera_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"holiday\.jpg has no camera.*separate sub-folder"):
        open_site(fill(tmp_path, ["holiday.jpg", "other.jpg"]))


def test_only_junk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"all 2 crops .* junk"):
        open_site(fill(tmp_path, ["-1_c1s1_000001_00.jpg", "-1_c2s1_000001_00.jpg"]))


@pytest.mark.parametrize("content", [[], ["notes.txt", "cam1/list.csv"]])
def test_folders_without_images_are_refused(tmp_path: Path, content: list[str]) -> None:
    fill(tmp_path, content)
    with pytest.raises(SiteError, match="has no JPEG, PNG or WebP file: expected a crop store"):
        open_site(tmp_path)


def test_a_missing_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"no site at .*nowhere: expected a crop store"):
        open_site(tmp_path / "nowhere")
    fill(tmp_path, ["crop.jpg"])
    with pytest.raises(SiteError, match=r"crop\.jpg is a file: expected a crop store"):
        open_site(tmp_path / "crop.jpg")


def test_hidden_files_and_links_are_ignored(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = fill(tmp_path_factory.mktemp("elsewhere"), ["cam9/a.jpg"])
    fill(tmp_path, ["cam1/a.jpg", "cam1/._a.jpg", "cam1/.trash/b.jpg", ".cache/c.jpg"])
    (tmp_path / "cam1" / "link.jpg").symlink_to(elsewhere / "cam9" / "a.jpg")
    (tmp_path / "cam9").symlink_to(elsewhere / "cam9")
    assert open_site(tmp_path).train.paths == ("cam1/a.jpg",)


def test_a_market_folder_of_links_is_refused(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = fill(tmp_path_factory.mktemp("elsewhere"), ["train/0002_c1s1_000451_03.jpg"])
    (tmp_path / "bounding_box_train").symlink_to(elsewhere / "train")
    with pytest.raises(SiteError, match="links are not followed"):
        open_site(tmp_path)


def test_a_damaged_store_is_not_taken_for_a_plain_folder(tmp_path: Path) -> None:
    fill(tmp_path, ["cam1/a.jpg"])
    (tmp_path / INDEX_FILE).write_bytes(b"PAR1 nonsense")
    with pytest.raises(StoreError, match="damaged"):
        open_site(tmp_path)


def test_tracks_are_derived_from_names_only_on_request(tmp_path: Path) -> None:
    fill(tmp_path, ["bounding_box_train/0002_c1s1_000451_01.jpg", "bounding_box_train/0002_c1s1_000701_01.jpg",
                    "bounding_box_train/0002_c1s1_000952_01.jpg", "bounding_box_train/0002_c2s1_000451_01.jpg",
                    "bounding_box_train/0002_c1s2_000451_01.jpg", "bounding_box_train/0003_c1s1_000451_01.jpg",
                    "query/0007_c1s1_000100_00.jpg", "bounding_box_test/0007_c1s1_000125_00.jpg",
                    "bounding_box_test/0000_c1s1_000125_00.jpg"])  # fmt: skip
    assert (open_site(tmp_path).train.tracks == -1).all()
    site = open_site(tmp_path, tracks_from_names=True)
    assert site.query is not None and site.gallery is not None
    track = dict(zip(site.train.paths, site.train.tracks.tolist(), strict=True))
    names = [path.removeprefix("bounding_box_train/") for path in track]
    assert names[0] == "0002_c1s1_000451_01.jpg"
    first, second, third, later, elsewhere, other = track.values()  # by name: 250 frames are 10 s, 251 are more
    assert first == second and len({first, third, later, elsewhere, other}) == 5
    assert site.query.tracks[0] == site.gallery.tracks[1] not in track.values()
    assert site.gallery.tracks[0] == -1  # person 0 has no identity
    plain = tmp_path / "plain"
    fill(plain, ["cam1/a.jpg", "cam2/b.jpg"])
    with pytest.raises(SiteError, match="to derive tracks from names"):
        open_site(plain, tracks_from_names=True)


@pytest.mark.real
def test_the_market_subset_opens() -> None:
    folder = SHARED / "data" / "market-subset"
    if not folder.is_dir():
        pytest.skip(f"no real crops at {folder}")
    site = open_site(folder)
    query, gallery = site.query, site.gallery
    assert query is not None and gallery is not None
    assert (len(site.train), len(query), len(gallery)) == (7519, 429, 1241)
    assert site.train.camera_names == ("c1", "c2", "c3", "c4", "c5", "c6")
    assert site.train.has_persons and not set(site.train.persons) & set(query.persons)
    assert not any(math.isnan(time_s) for time_s in site.train.times_s)
