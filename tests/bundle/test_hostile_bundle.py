"""Hostile bundles, opened like in the service: rejected by file name before anything is run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import socket
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from serving import DIM, SPEC, embed_by_hand, graph, make_bundle

from resight.bundle.bundle import Bundle, Graph, open_bundle, write_bundle
from resight.bundle.manifest import MANIFEST_FILE, SCHEMA_VERSION, space_id, to_json
from resight.bundle.probes import Parity, make_probes
from resight.errors import BundleError
from resight.runtime.providers import open_runtime

FORMS = (("fp32", "onnx"), ("fp16", "onnx"), ("int8", "onnx"), ("int8", "tensorrt"))
IMAGES = np.random.default_rng(0).integers(0, 256, (5, SPEC.height, SPEC.width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small real graph in every form of a bundle, each with different bytes."""
    return write_bundle(
        tmp_path_factory.mktemp("hostile") / "original",
        name="forms",
        space_id=space_id(b"forms", SPEC, DIM),
        image=SPEC,
        graphs=[Graph(renamed(f"{p} {r}"), Parity(0.0, 1.0), p, r) for p, r in FORMS],
        probes=make_probes(SPEC, embed_by_hand, count=4),
        weights_licence="none",
        training={"recipe": {"name": "purify"}},
    ).path


def renamed(name: str) -> bytes:
    model = onnx.load_from_string(graph(0))
    model.graph.name = name
    return model.SerializeToString()


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "bundle"
    shutil.copytree(original, copy)
    return copy


def spell(body: dict[str, Any]) -> bytes:
    """A manifest with the digest of its own body, as anyone can write it from the documentation."""

    def plain(value: dict[str, Any]) -> bytes:
        return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()

    body = {key: value for key, value in body.items() if key != "manifest_sha256"}
    return plain(body | {"manifest_sha256": hashlib.sha256(plain(body)).hexdigest()})


def rewrite(folder: Path, **changes: Any) -> None:
    body = json.loads((folder / MANIFEST_FILE).read_bytes())
    (folder / MANIFEST_FILE).write_bytes(spell(body | changes))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(folder: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        open_bundle(folder)


def test_every_form_exists_and_opens(folder: Path) -> None:
    bundle = open_bundle(folder)
    assert len({bundle.read(*form) for form in FORMS}) == len(FORMS) == len(names(folder)) - 2


@pytest.mark.parametrize("name", ["../model.onnx", "..", ".", "", "/etc/passwd", "sub/model.onnx", "model.onnx\0.txt", "..\\model.onnx", "c:model.onnx", "c:\\model.onnx", "\\\\host\\share", "model.onnx\n", "%2e%2e%2fmodel.onnx", "~", "con:", "MODEL.ONNX", "mödel.onnx", "a" * 64])  # fmt: skip  # noqa: E501
@pytest.mark.parametrize("of", ["artefacts", "probes"])
def test_a_name_outside_the_folder_is_rejected(folder: Path, name: str, of: str) -> None:
    """Same bytes and hash, only the name is wrong."""
    body = json.loads((folder / MANIFEST_FILE).read_bytes())
    entry = body[of][0] if of == "artefacts" else body[of]
    source = folder / entry["file"]
    (folder / "sub").mkdir()
    for target in (folder.parent / "model.onnx", folder / "sub" / "model.onnx"):
        shutil.copyfile(source, target)
    entry["file"] = name
    (folder / MANIFEST_FILE).write_bytes(spell(body))
    refused(folder, r"manifest\.json: file: expected 1-63 of a-z 0-9")


def test_a_file_that_is_a_link_is_rejected(folder: Path) -> None:
    for name in names(folder):
        whole = (folder / name).read_bytes()
        aside = folder.parent / "aside"
        aside.write_bytes(whole)
        for target in (aside, Path("../aside"), folder.parent / "nothing", Path(name)):  # the last one points to itself
            (folder / name).unlink()
            (folder / name).symlink_to(target)
            refused(folder, rf"{name} in .* is a symbolic link")
        (folder / name).unlink()
        (folder / name).write_bytes(whole)
    open_bundle(folder)


def test_a_folder_in_place_of_a_file_is_rejected(folder: Path) -> None:
    """Neither a real folder nor a link to one that contains the file."""
    elsewhere = folder.parent / "elsewhere"
    shutil.copytree(folder, elsewhere)
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(elsewhere, target_is_directory=True)
    refused(folder, r"model\.onnx in .* is a symbolic link")


def test_a_link_to_a_bundle_is_followed_and_its_target_verified(folder: Path) -> None:
    """The bundle folder may be a link (`current -> 2026-01-02`); inside it links are rejected."""
    current = folder.parent / "current"
    current.symlink_to(folder, target_is_directory=True)
    assert open_bundle(current).read() == open_bundle(folder).read()
    (folder / "model.onnx").write_bytes(b"other")
    refused(current, r"model\.onnx in .*current is not the file that was exported")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_special_files_are_rejected_without_blocking(folder: Path, kind: str) -> None:
    for name in names(folder):
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        with contextlib.ExitStack() as stack:
            if kind == "pipe":
                os.mkfifo(folder / name)
            elif kind == "socket":
                stack.enter_context(contextlib.closing(listener := socket.socket(socket.AF_UNIX)))
                stack.enter_context(contextlib.chdir(folder))  # a socket's path has 108 characters at most
                listener.bind(name)
            elif not make_device(folder / name):
                pytest.skip("making a device node needs rights this process has not")
            refused(folder, rf"{name} in .*(expected a regular file|expected a readable regular file)")
        (folder / name).unlink()
        (folder / name).write_bytes(whole)


def make_device(path: Path) -> bool:
    """/dev/zero: endless bytes."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
    except PermissionError:
        return False
    return True


def test_exchanged_files_are_rejected(folder: Path) -> None:
    """Both files belong to the bundle and are intact, but exchanged in the manifest."""
    files = [name for name in names(folder) if name != MANIFEST_FILE]
    for one in files:
        for other in files:
            if one < other:
                exchange(folder / one, folder / other)
                refused(folder, rf"({one}|{other}) in .* is not the file that was exported")
                exchange(folder / one, folder / other)
    open_bundle(folder)


def exchange(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def test_a_form_under_another_forms_name_fails_the_probes(folder: Path) -> None:
    """With corrected hashes only the names of the forms disagree; the manifest decides which one is run."""
    body = json.loads((folder / MANIFEST_FILE).read_bytes())
    first, second = body["artefacts"][:2]
    first["file"], second["file"] = second["file"], first["file"]
    (folder / MANIFEST_FILE).write_bytes(spell(body))
    refused(folder, r"model.*\.onnx in .* is not the file that was exported")


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_each_truncated_file_is_rejected(folder: Path, size: int) -> None:
    for name in names(folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:size])
        refused(folder, name)
        (folder / name).write_bytes(whole)


def test_any_flipped_byte_in_any_file_is_rejected_by_name(folder: Path) -> None:
    rng = np.random.default_rng(5)
    for name in names(folder):
        whole = (folder / name).read_bytes()
        places = {0, len(whole) - 1, *rng.integers(0, len(whole), 60).tolist()}
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(rng.integers(8))
            (folder / name).write_bytes(damaged)
            refused(folder, name)
        (folder / name).write_bytes(whole)
    open_bundle(folder)


@pytest.mark.parametrize("version", [0, 1, SCHEMA_VERSION + 1, 10**6, -1, "2", None, [2]])
def test_another_schema_is_rejected_with_advice(folder: Path, version: object) -> None:
    rewrite(folder, schema_version=version)
    refused(folder, rf"manifest\.json has schema_version .*this program reads {SCHEMA_VERSION}: use the resight")


def test_a_schema_version_that_is_not_an_integer_is_rejected(folder: Path) -> None:
    rewrite(folder, schema_version=float(SCHEMA_VERSION))
    refused(folder, r"manifest\.json: .*schema_version: expected int")


def test_a_manifest_of_the_first_schema_is_not_reported_as_damage(folder: Path) -> None:
    """In the format of the first release: no calibration, no signer."""
    body = json.loads((folder / MANIFEST_FILE).read_bytes()) | {"schema_version": 1}
    (folder / MANIFEST_FILE).write_bytes(spell({k: v for k, v in body.items() if k not in ("calibration", "signer")}))
    refused(folder, r"has schema_version 1, .*export the checkpoint with this one")


HUGE = "1" + "0" * 5000  # more digits than Python parses


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"feature_dim": 32', f'"feature_dim": {HUGE}'),
        lambda text: text.replace('"feature_dim": 32', '"feature_dim": 1e999'),
        lambda text: text.replace('"feature_dim": 32', '"feature_dim": 3.2e1'),
        lambda text: text.replace('"feature_dim": 32', '"feature_dim": 32, "feature_dim": 32'),
        lambda text: text.replace("{\n", '{\n  "name": "another",\n', 1),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.rstrip(),
        lambda text: text + "\n",
        lambda text: "\ufeff" + text,
        lambda text: text.replace('"forms"', '"\\u0066orms"'),
        lambda text: text.replace("  ", " "),
        lambda text: text.replace('"purify"', '"purify\ud800"'.encode("utf-8", "surrogatepass").decode("latin-1")),
        lambda text: text.replace('"purify"', '"\\ud800"'),
        lambda text: text.replace('"purify"', "[" * 2000 + "]" * 2000),
        lambda text: text.replace('"purify"', '{"a":' * 50_000 + "1" + "}" * 50_000),
        lambda text: json.dumps(json.loads(text)),
        lambda text: json.dumps(json.loads(text), indent=2),
    ],
    ids=[
        "digits", "infinite", "a float", "duplicate key", "duplicate name", "CRLF", "no last line end", "two of them",
        "byte order mark", "escapes", "indent", "surrogate bytes", "surrogate", "deep lists", "deep objects",
        "one line", "no last line end either",
    ],
)  # fmt: skip
def test_a_manifest_that_is_not_canonical_is_rejected(folder: Path, change: Any) -> None:
    text = (folder / MANIFEST_FILE).read_text()
    changed = change(text)
    assert changed != text
    (folder / MANIFEST_FILE).write_bytes(changed.encode())
    refused(folder, r"manifest\.json was altered or damaged")


@pytest.mark.parametrize("depth", [50, 200, 300, 450, 600])
def test_deeply_nested_manifests_open_or_are_rejected(folder: Path, depth: int) -> None:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    try:
        rewrite(folder, training={"recipe": value})
    except RecursionError:
        pytest.skip("Python's own JSON does not spell it")
    try:
        assert open_bundle(folder).manifest.training == {"recipe": value}
    except BundleError as error:
        assert depth > 200 and "manifest.json" in str(error)


def test_a_file_exchanged_after_opening_is_not_used(folder: Path) -> None:
    bundle = open_bundle(folder)
    (folder / "hidden").write_bytes(renamed("evil"))
    os.replace(folder / "hidden", folder / "model.onnx")
    with pytest.raises(BundleError, match=r"model\.onnx .* is not the file that was exported"):
        bundle.read()
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(folder / "model.int8.onnx")
    with pytest.raises(BundleError, match=r"model\.onnx .* is a symbolic link"):
        open_runtime(bundle)
    os.replace(folder / "model.int8.onnx", folder / "probes.npz")
    with pytest.raises(BundleError, match=r"probes\.npz .* is not the file that was exported"):
        bundle.probes()


def test_reading_during_an_exchange_gives_the_right_bytes_or_an_error(folder: Path) -> None:
    """Hash and content come from one read: there is no race between check and use."""
    bundle, good = open_bundle(folder), renamed("fp32 onnx")
    stop = threading.Event()

    def exchange_for_ever() -> None:
        for number in range(10**9):
            if stop.is_set():
                return
            spare = folder / f"spare{number % 2}"
            spare.write_bytes(good if number % 2 else renamed("evil"))
            os.replace(spare, folder / "model.onnx")

    thread = threading.Thread(target=exchange_for_ever)
    thread.start()
    outcomes = set()
    try:
        for _ in range(3000):
            try:
                assert bundle.read() == good
                outcomes.add("right")
            except BundleError as error:
                assert "model.onnx" in str(error)
                outcomes.add("refused")
    finally:
        stop.set()
        thread.join(10)
    assert outcomes == {"right", "refused"}


def test_a_bundle_moved_to_another_folder_embeds_the_same(tmp_path: Path) -> None:
    first = make_bundle(tmp_path / "first")
    expected = open_runtime(first).embed(IMAGES)
    for place in ("an other/naïve name", "deeper/and/deeper"):
        moved = tmp_path / place
        moved.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(first.path, moved)
        first = open_bundle(moved)
        assert np.array_equal(open_runtime(first).embed(IMAGES), expected)
    assert np.abs(expected - embed_by_hand(IMAGES)).max() < 1e-5


def hostile_external(model: ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret")


def hostile_operator(model: ModelProto) -> None:
    """Onnxruntime would run it with the same result."""
    model.graph.node[-1].output[0] = "almost"
    model.graph.node.append(helper.make_node("Identity", ["almost"], ["features"]))


def hostile_size(model: ModelProto) -> None:
    """Half a terabyte for a batch of 32 that the output does not need: it would still be loaded and planned."""
    nodes = [helper.make_node("Concat", [f"x{i}" if i else "t"] * 2, [f"x{i + 1}"], axis=1) for i in range(20)]
    model.graph.node.extend(nodes)


@pytest.mark.parametrize(
    ("harm", "message"),
    [(hostile_external, "external_data"), (hostile_operator, ":Identity"), (hostile_size, "elements of 'x")],
)
def test_a_hostile_graph_in_a_valid_bundle_does_not_reach_onnxruntime(tmp_path: Path, harm: Any, message: str) -> None:
    """Every hash matches, since the attacker wrote the manifest."""
    bundle = make_bundle(tmp_path / "bundle")
    model = onnx.load_from_string(bundle.read())
    harm(model)
    with pytest.raises(BundleError, match=rf"model\.onnx was rejected before it was run: .*{message}"):
        open_runtime(with_graph(bundle, model.SerializeToString()))


def with_graph(bundle: Bundle, data: bytes) -> Bundle:
    """The bundle with another graph and a matching manifest."""
    entry = dataclasses.replace(bundle.find(), sha256=hashlib.sha256(data).hexdigest())
    (bundle.path / entry.file).write_bytes(data)
    (bundle.path / MANIFEST_FILE).write_bytes(to_json(dataclasses.replace(bundle.manifest, artefacts=(entry,))))
    return open_bundle(bundle.path)


def test_a_graph_that_loads_but_does_not_run_is_rejected(tmp_path: Path) -> None:
    """Shape inference does not compare the channels of a convolution; only its first run does."""
    bundle = make_bundle(tmp_path / "bundle")
    model = onnx.load_from_string(bundle.read())
    model.graph.initializer.append(numpy_helper.from_array(np.ones((3, 5, 1, 1), np.float32), "odd"))
    place = next(i for i, node in enumerate(model.graph.node) if node.op_type == "Transpose")
    model.graph.node[place].output[0] = "before"
    model.graph.node.insert(place + 1, helper.make_node("Conv", ["before", "odd"], ["t"]))
    with pytest.raises(
        BundleError, match=r"(model\.onnx.*does not run|cannot load model\.onnx).*export the bundle again"
    ):
        open_runtime(with_graph(bundle, model.SerializeToString()))
