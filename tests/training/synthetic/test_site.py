import hashlib
import inspect
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resight.image import decode
from resight.metrics.ranking import evaluate_ranking
from resight.training.store.crops import INDEX_FILE, CropStore, check_crops
from resight.training.store.datasets import Site
from resight.training.synthetic.camera import make_cameras, take_crop
from resight.training.synthetic.figure import Placement, Pose, cut_limb, draw_person
from resight.training.synthetic.people import Person, World, sample_people
from resight.training.synthetic.site import SiteSettings, demo_site, render_site

SMALL = SiteSettings(
    train_persons=12, test_persons=24, strangers=4, cameras=4, visits=(2, 4), crops=3, height=64, width=32
)
WORLDS: tuple[World, ...] = ("source", "site")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return render_site(tmp_path_factory.mktemp("site"), SMALL, seed=5)


def digest(root: Path) -> str:
    """Digest of the names and bytes of all files in a folder."""
    content = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        content.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return content.hexdigest()


def test_the_same_seed_gives_the_same_bytes(site: Site, tmp_path: Path) -> None:
    render_site(tmp_path / "again", SMALL, seed=5)
    render_site(tmp_path / "other", SMALL, seed=6)
    assert digest(tmp_path / "again") == digest(site.root)
    assert digest(tmp_path / "other") != digest(site.root)
    index = {name: (tmp_path / name / INDEX_FILE).read_bytes() for name in ("again", "other")}
    assert index["again"] != index["other"]


def test_the_two_worlds_differ(tmp_path: Path) -> None:
    for world in WORLDS:
        settings = SiteSettings(world, train_persons=2, test_persons=0, strangers=0, crops=1, height=64, width=32)
        drawn = render_site(tmp_path / world, settings, seed=1)
        assert drawn.query is None and drawn.gallery is None and set(drawn.train.persons) == {1, 2}
    assert digest(tmp_path / "source") != digest(tmp_path / "site")


def test_the_splits_are_suitable_for_evaluation(site: Site) -> None:
    assert site.query is not None and site.gallery is not None
    train, test = set(site.train.persons), set(site.query.persons) | set(site.gallery.persons)
    assert len(train) == 12 and not train & test
    assert len(set(site.query.persons)) == 24 and 0 in set(site.gallery.persons) and 0 not in set(site.query.persons)
    for person, camera in zip(site.query.persons, site.query.cameras, strict=True):
        assert ((site.gallery.persons == person) & (site.gallery.cameras != camera)).any()
    assert site.train.camera_names == site.query.camera_names == site.gallery.camera_names
    assert site.train.camera_names == ("cam1", "cam2", "cam3", "cam4")
    for store in (site.train, site.query, site.gallery):
        assert all(f"/cam{camera + 1}/" in path for path, camera in zip(store.paths, store.cameras, strict=True))


def test_cameras_beyond_nine_keep_their_numbers(tmp_path: Path) -> None:
    settings = SiteSettings(
        train_persons=6, test_persons=0, strangers=0, cameras=12, visits=(8, 12), crops=1, height=64, width=32
    )
    store = render_site(tmp_path, settings, seed=2).train
    assert all(f"/cam{camera + 1}/" in path for path, camera in zip(store.paths, store.cameras, strict=True))


def test_a_track_is_one_visit_of_one_person(site: Site) -> None:
    assert site.query is not None and site.gallery is not None
    seen: dict[int, set[tuple[int, int]]] = {}
    counts: Counter[int] = Counter()
    for store in (site.train, site.query, site.gallery):
        for track, person, camera in zip(store.tracks, store.persons, store.cameras, strict=True):
            seen.setdefault(int(track), set()).add((int(person), int(camera)))
            counts[int(track)] += 1
    assert all(len(who) == 1 for who in seen.values()) and set(counts.values()) == {SMALL.crops}
    for track in set(site.train.tracks):
        assert np.allclose(np.diff(site.train.times_s[site.train.tracks == track]), 0.4)


def test_every_crop_is_usable_and_has_the_requested_size(site: Site) -> None:
    assert not check_crops(site.train)
    assert decode(site.train.read(0)).shape == (64, 32, 3)


def raw_pixels(store: CropStore) -> np.ndarray:
    """32 x 16 RGB, each crop centred and of unit length, as a baseline without a model."""
    rows = []
    for row in range(len(store)):
        small = Image.fromarray(decode(store.read(row))).resize((16, 32), Image.Resampling.BOX)
        values = np.asarray(small, np.float32).ravel()
        values -= values.mean()
        rows.append(values / np.linalg.norm(values))
    return np.stack(rows)


def test_raw_pixels_do_not_find_people_across_cameras(site: Site) -> None:
    query, gallery = site.query, site.gallery
    assert query is not None and gallery is not None
    pixels = raw_pixels(query), raw_pixels(gallery)
    score = evaluate_ranking(*pixels, query.persons, gallery.persons, query.cameras, gallery.cameras)
    assert score.rank(1) < 0.35
    # Within a camera the same pixels find them, so the difficulty is due to the cameras.
    tracks = gallery.tracks[(pixels[0] @ pixels[1].T).argmax(1)]
    assert (tracks == query.tracks).mean() > 2 * score.rank(1)


@pytest.mark.parametrize("world", WORLDS)
def test_all_people_differ_also_those_with_the_same_colours(world: World) -> None:
    people = sample_people(400, np.random.default_rng(0), world=world)
    assert len(set(people)) == len(people) == 400
    appearances = {(who.upper, who.lower, who.pattern, who.bag, who.hair_style, who.hat) for who in people}
    assert len(appearances) == 400
    assert people == sample_people(400, np.random.default_rng(0), world=world)
    assert people[:5] != sample_people(5, np.random.default_rng(1), world=world)


def painted(person: Person, pose: Pose) -> np.ndarray:
    layer = Image.new("RGBA", (128, 256))
    draw_person(layer, person, pose, Placement(64, 5, 240))
    return np.asarray(layer)


def test_all_people_look_different_from_some_angle() -> None:
    people = sample_people(60, np.random.default_rng(3), world="source")
    poses = [Pose(turn, phase=1.0, stride=0.4) for turn in np.linspace(0, 2 * np.pi, 5)[:4]]
    seen = {hashlib.sha256(b"".join(painted(who, pose).tobytes() for pose in poses)).digest() for who in people}
    assert len(seen) == 60
    for who in people:
        front = painted(who, poses[0])
        assert 0.05 < (front[..., 3] > 0).mean() < 0.6  # a person covers a plausible part of the image
        assert not np.array_equal(front, painted(who, poses[2]))


def test_cameras_see_one_person_differently_and_repeatably() -> None:
    rng = np.random.default_rng(8)
    cameras = make_cameras(3, rng, world="site", height=64, width=32)
    who = sample_people(1, rng, world="site")[0]
    crops = [take_crop(who, camera, 0.3, np.random.default_rng(1)) for camera in cameras]
    assert all(crop.shape == (64, 32, 3) and crop.dtype == np.uint8 for crop in crops)
    assert len({crop.tobytes() for crop in crops}) == 3
    assert np.array_equal(crops[0], take_crop(who, cameras[0], 0.3, np.random.default_rng(1)))


def test_a_limb_is_cut_where_the_sleeve_ends() -> None:
    joints = [(0.0, 0.0), (0.0, 10.0), (10.0, 10.0)]
    assert cut_limb(joints, 1.0) == joints
    assert cut_limb(joints, 0.25) == [(0.0, 0.0), (0.0, 5.0)]
    assert cut_limb(joints, 0.75) == [(0.0, 0.0), (0.0, 10.0), (5.0, 10.0)]


def test_the_demo_site_has_the_settings_of_the_published_results() -> None:
    settings = SiteSettings()
    assert (settings.world, settings.train_persons, settings.test_persons, settings.strangers) == ("site", 160, 60, 20)
    assert (settings.cameras, settings.visits, settings.crops) == (6, (4, 6), 3)
    assert (settings.height, settings.width) == (128, 64)
    assert list(inspect.signature(demo_site).parameters) == ["root", "seed"]
