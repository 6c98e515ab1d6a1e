"""What the benchmarks of the service are made of: bundles, crops, rows, servers, and a look at their processes."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from load import ENROL_BATCH, Load, LoadResult, put
from PIL import Image

from resight.arrays import Feature
from resight.bundle.bundle import Bundle, open_bundle
from resight.client import Client
from resight.demo.harness import running_server
from resight.v1 import common_pb2, embedding_pb2, gallery_pb2, search_pb2

TOP_K = 10
PIECE = 64  # entries of one enrolment call, the server's default limit
LOADED = 64_000  # entries made into requests at a time: 140 MB


@dataclass(frozen=True)
class Row:
    """What was measured, the figure, what it should be, and whether it is; None = there is no goal."""

    what: str
    figure: str
    goal: str = ""
    ok: bool | None = None


Rows = Iterator[Row]


def crops(count: int = 64) -> tuple[bytes, ...]:
    """JPEGs of drawn people, 128 x 256, about as large as a camera's."""
    from resight.training.synthetic.camera import make_cameras, take_crop
    from resight.training.synthetic.people import sample_people

    rng = np.random.default_rng(0)
    (camera,) = make_cameras(1, rng, world="site", height=256, width=128)
    made = []
    for person in sample_people(count, rng, world="site"):
        buffer = io.BytesIO()
        Image.fromarray(take_crop(person, camera, 0.0, rng)).save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return tuple(made)


def bundle_of(backbone: str, path: Path, *, seed: int = 0) -> Bundle:
    """A bundle of random weights, with batch norms that have seen crops: they tell probes apart."""
    import torch
    from torch import nn

    from resight.encoder.model import Encoder, EncoderConfig
    from resight.exporters.export import export_encoder

    torch.manual_seed(seed)
    encoder = Encoder(EncoderConfig(backbone=backbone))
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None
    size = encoder.config.image
    with torch.no_grad():
        encoder.train()(encoder.normalise(torch.randint(0, 256, (32, size.height, size.width, 3), dtype=torch.uint8)))
    return export_encoder(encoder.eval(), path, name=backbone, training={}, weights_licence="none")


def rows_of(count: int, dim: int, seed: int) -> Feature:
    """float32 (count, dim) unit rows."""
    rows = np.random.default_rng(seed).standard_normal((count, dim), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


class ServerWatch:
    """Looks at the process of a server.

    Args:
        data: its folder, which tells its number.
    """

    def __init__(self, data: Path) -> None:
        self.pid = int(json.loads((data / "server.json").read_text())["pid"])

    def resident(self) -> int:
        """Bytes of its own in memory: neither files nor shared pages."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@dataclass(frozen=True)
class Bench:
    """What all measurements share."""

    bundles: Path
    folder: Path
    seconds: float
    rounds: int
    jpegs: tuple[bytes, ...]

    def bundle(self, backbone: str) -> Bundle:
        """Exported once."""
        path = self.bundles / f"{backbone}.bundle"
        return open_bundle(path) if path.exists() else bundle_of(backbone, path)

    @contextmanager
    def serving(self, bundle: Bundle, name: str, **settings: str) -> Iterator[tuple[str, ServerWatch]]:
        """A server of its own process; yields its address and what watches it."""
        before = dict(os.environ)
        os.environ.update({f"RESIGHT_{key.upper()}": value for key, value in settings.items()})
        with ExitStack() as stack:
            try:
                address = stack.enter_context(running_server(bundle.path, self.folder / name, max_top_k=1000))
            finally:  # at once: another server may be started in the block
                os.environ.clear()
                os.environ.update(before)
            yield address, ServerWatch(self.folder / name)

    def embeds(self) -> list[bytes]:
        """Requests of Embed."""
        return [
            embedding_pb2.EmbedRequest(image=common_pb2.ImageCrop(data=jpeg)).SerializeToString() for jpeg in self.jpegs
        ]

    def embed_streams(self) -> list[bytes]:
        """Requests of StreamEmbed."""
        return [
            embedding_pb2.StreamEmbedRequest(image=common_pb2.ImageCrop(data=jpeg)).SerializeToString()
            for jpeg in self.jpegs
        ]

    def embed_batches(self, size: int) -> list[bytes]:
        """Requests of BatchEmbed with ``size`` crops each."""
        images = [common_pb2.ImageCrop(data=jpeg) for jpeg in self.jpegs]
        return [
            embedding_pb2.BatchEmbedRequest(images=images[start : start + size]).SerializeToString()
            for start in range(0, len(images) - size + 1, size)
        ]

    def searches(self, collection: str) -> list[bytes]:
        """Requests of Search for a crop."""
        return [
            search_pb2.SearchRequest(
                collection_id=collection, image=common_pb2.ImageCrop(data=jpeg), top_k=TOP_K
            ).SerializeToString()
            for jpeg in self.jpegs
        ]


def sure(outcome: LoadResult) -> LoadResult:
    """What was outcome, all of it answers."""
    if set(outcome.codes) != {"OK"}:
        raise SystemExit(f"calls failed that should not: {dict(outcome.codes)}, {outcome.errors}")
    return outcome


def fill(address: str, bundle: Bundle, count: int, *, collection: str = "bench") -> float:
    """Make a collection and enrol random features; returns entries a second."""
    with Client(address) as client:
        client.create_collection(collection, unlimited_retention=True)
    dim, space = bundle.manifest.feature_dim, bundle.manifest.space_id
    taken_s = 0.0
    for start in range(0, count, LOADED):
        rows = rows_of(min(LOADED, count - start), dim, start)
        requests = [
            gallery_pb2.BatchEnrollEntriesRequest(
                collection_id=collection,
                requests=[
                    gallery_pb2.EnrollEntryRequest(
                        entry=gallery_pb2.Entry(entry_id=str(start + number), camera_id="door"),
                        embedding=common_pb2.Embedding(float32_le=rows[number].tobytes(), space_id=space),
                    )
                    for number in range(first, min(first + PIECE, len(rows)))
                ],
            ).SerializeToString()
            for first in range(0, len(rows), PIECE)
        ]
        taken_s += sure(put(Load(address, ENROL_BATCH, requests, in_flight=8))).wall_s
    return count / taken_s
