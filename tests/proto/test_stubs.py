import re
import subprocess
import sys
from pathlib import Path

import grpc_tools
from google.protobuf import descriptor_pb2
from google.rpc import status_pb2

from resight.v1 import admin_pb2, common_pb2, embedding_pb2, gallery_pb2, search_pb2

PROTO = Path(__file__).parents[2] / "proto"


def test_the_committed_stubs_are_what_the_protos_make(tmp_path):
    subprocess.run([sys.executable, str(PROTO / "generate.py"), str(tmp_path)], check=True, capture_output=True)
    made = {path.name: path.read_text() for path in (tmp_path / "resight" / "v1").iterdir()}
    held = {path.name: path.read_text() for path in (PROTO / "resight" / "v1").glob("*_pb2*") if path.is_file()}
    assert made.keys() == held.keys()
    stale = [name for name in made if made[name] != held[name]]
    assert stale == [], "run `make proto`"


def test_the_protos_are_complete_for_other_languages(tmp_path):
    """As a foreign client compiles them: no include path but proto/, apart from protoc's own google/protobuf."""
    protoc = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", f"-I{Path(grpc_tools.__path__[0]) / '_proto'}"]
    protos = [str(path.relative_to(PROTO)) for path in sorted(PROTO.glob("resight/v1/*.proto"))]
    out = tmp_path / "descriptors"
    done = subprocess.run([*protoc, f"--descriptor_set_out={out}", *protos], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    assert len(files) == len(protos)


def test_the_vendored_status_is_googles():
    ours = (PROTO / "google/rpc/status.proto").read_text()
    assert status_pb2.Status.DESCRIPTOR.full_name == "google.rpc.Status"
    for field in status_pb2.Status.DESCRIPTOR.fields:
        assert re.search(rf" {field.name} = {field.number};", ours), field.name


def test_field_numbers_already_in_use_never_change():
    """The wire contract of what has been released; adding a line is fine, changing one breaks clients."""
    numbers = {
        message.name: {field.name: field.number for field in message.fields}
        for module in (common_pb2, embedding_pb2, gallery_pb2, search_pb2, admin_pb2)
        for message in module.DESCRIPTOR.message_types_by_name.values()
    }
    expected = {
        "ImageCrop": {"data": 1},
        "Embedding": {"float32_le": 1, "space_id": 2},
        "EmbeddingSpace": {"space_id": 1, "model_id": 2, "dim": 4},
        "Timings": {"decode_ns": 1, "queue_ns": 2, "infer_ns": 3, "search_ns": 4},
        "SearchRequest": {
            "collection_id": 1,
            "image": 2,
            "shots": 3,
            "embedding": 4,
            "entry_id": 5,
            "top_k": 6,
            "filter": 7,
            "min_cosine": 11,
            "include_embeddings": 14,
        },
        "Hit": {"entry": 1, "score": 2, "embedding": 6},
        "SearchResponse": {
            "hits": 1,
            "space": 3,
            "searched_revision": 4,
            "exact": 5,
            "query_quality": 6,
            "timings": 7,
        },
        "Collection": {
            "collection_id": 1,
            "space": 2,
            "default_ttl": 3,
            "crop_retention": 5,
            "entry_count": 8,
            "revision": 9,
            "indexed_revision": 10,
        },
        "Entry": {
            "entry_id": 1,
            "subject_id": 2,
            "camera_id": 3,
            "track_id": 4,
            "capture_time": 5,
            "expire_time": 6,
            "labels": 7,
            "quality": 8,
            "shot_count": 9,
            "create_time": 10,
        },
        "EnrollEntryRequest": {
            "collection_id": 1,
            "entry": 2,
            "image": 3,
            "shots": 4,
            "embedding": 5,
            "request_id": 6,
            "on_duplicate": 7,
        },
        "EntryFilter": {
            "camera_ids": 1,
            "exclude_camera_ids": 2,
            "capture_window": 3,
            "track_ids": 4,
            "exclude_track_ids": 5,
            "subject_ids": 6,
            "labels": 7,
            "min_quality": 8,
        },
    }
    for message, fields in expected.items():
        assert fields.items() <= numbers[message].items(), message
