"""The pieces that benchmarks/bench_gpu.py measures: training, runtimes, the faiss index, the service."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from resight.arrays import Pixels
from resight.bundle.bundle import Bundle, open_bundle
from resight.bundle.probes import EmbedBatch, draw_jpegs
from resight.errors import ReIDError
from resight.image import decode, fit

BATCHES = (1, 8, 32)
TRAIN_BATCH = 64  # the recipes' own
GALLERY, DIM, QUERIES = 100_000, 512, 64  # the size the service's index is held to

Rows = list[tuple[str, str]]
"""What was measured, and the figure; or why not."""


def rate(step: Callable[[], object], items: int, seconds: float, wait: Callable[[], object] = lambda: None) -> float:
    """Items a second of a repeated step, after two that are not counted; ``wait`` ends what runs on the GPU."""
    step(), step(), wait()
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        step()
        done += items
    wait()
    return done / (time.perf_counter() - started)


def training(device: str, seconds: float) -> Rows:
    """Forward, backward and step of ResNet-50 on ready batches, in fp32 and bf16."""
    import torch

    from resight.encoder.model import Encoder, EncoderConfig
    from resight.training.features.extract import autocast

    if device == "cuda" and not torch.cuda.is_available():
        return [("training step", f"not run: this torch ({torch.__version__}) sees no GPU")]
    batch = TRAIN_BATCH if device == "cuda" else 4
    config = EncoderConfig(backbone="resnet50" if device == "cuda" else "osnet_x0_25")
    images = torch.rand(batch, 3, config.image.height, config.image.width, device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    found: Rows = []
    for precision in ("fp32", "bf16"):
        encoder = Encoder(config).to(device=device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.Adam(encoder.parameters())

        def step(encoder: Encoder = encoder, optimizer: torch.optim.Adam = optimizer, kind: str = precision) -> None:
            with autocast(device, kind):  # type: ignore[arg-type]  # both are precisions
                views = encoder(images.contiguous(memory_format=torch.channels_last))
            optimizer.zero_grad(set_to_none=True)
            torch.stack([view.float().pow(2).sum() for view in views]).sum().backward()
            optimizer.step()

        what = f"training step, {config.backbone}, batch {batch}, {precision}"
        found.append((what, f"{rate(step, batch, seconds, wait):.1f} crops/s"))
    return found


def runtimes(bundle: Bundle, providers: tuple[str, ...], seconds: float, cache: Path) -> Rows:
    """Crops a second of every runtime and precision, and how near each came to torch on the probes."""
    from resight.bundle.probes import measure_parity
    from resight.runtime.providers import open_runtime

    found: Rows = []
    precisions = dict.fromkeys(artefact.precision for artefact in bundle.manifest.artefacts)
    for provider in providers:
        for precision in precisions:
            what = f"{provider} {precision}"
            try:
                started = time.perf_counter()
                runtime = open_runtime(
                    bundle,
                    provider=provider,  # type: ignore[arg-type]  # all are providers
                    precision=precision,
                    max_batch=max(BATCHES),
                    engine_cache=cache,
                )
                loaded = time.perf_counter() - started
                parity = measure_parity(bundle.probes(), runtime.embed)
            except ReIDError as error:
                found.append((what, f"not run: {error}"))
                continue
            shape = (runtime.image.height, runtime.image.width, 3)
            crops = np.random.default_rng(0).integers(0, 256, (max(BATCHES), *shape), dtype=np.uint8)
            measured = ", ".join(
                f"batch {size}: {one:.0f}" for size, one in rates(runtime.embed, crops, seconds).items()
            )
            found.append((what, f"{measured} crops/s; min cosine {parity.min_cosine:.6f}; ready in {loaded:.1f} s"))
            if provider == "cuda" and precision == "fp32":
                found.append(binding(runtime, crops, seconds))
            del runtime
    return found


def rates(run: EmbedBatch, crops: Pixels, seconds: float) -> dict[int, float]:
    """Crops a second by size of batch."""
    return {size: rate(lambda: run(crops[:size]), size, seconds / len(BATCHES)) for size in BATCHES}  # noqa: B023


def binding(runtime: object, crops: Pixels, seconds: float) -> tuple[str, str]:
    """The same session with inputs and outputs bound to the GPU: what is left to gain by it."""
    session = runtime._session  # type: ignore[attr-defined]  # the bench looks under the bonnet
    bound = session.io_binding()

    def step() -> None:
        bound.bind_cpu_input("images", crops)
        bound.bind_output("features", "cpu")
        session.run_with_iobinding(bound)

    return "cuda fp32, IO binding, batch 32", f"{rate(step, len(crops), seconds):.0f} crops/s"


def index(device: str, seconds: float) -> Rows:
    """The filter self-test, and searches of 100 000 features on the GPU and on the CPU."""
    import faiss

    if device == "cuda" and not getattr(faiss, "get_num_gpus", lambda: 0)():
        return [("faiss index", f"not run: faiss {faiss.__version__} here has no GPU: install faiss-gpu-cuvs")]
    faiss.omp_set_num_threads(1)  # as the service: parallelism comes from requests
    rng = np.random.default_rng(0)
    features = rng.standard_normal((GALLERY, DIM), dtype=np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)

    def make(rows: np.ndarray, on_gpu: bool) -> faiss.Index:
        flat = faiss.IndexFlatIP(DIM)
        flat.add(rows)
        if not on_gpu:
            return flat
        options = faiss.GpuClonerOptions()
        options.use_cuvs = True  # the classic GPU indexes take a selector and do not use it
        return faiss.index_cpu_to_gpu(resources, 0, flat, options)

    resources = faiss.StandardGpuResources() if device == "cuda" else None
    found: Rows = []
    for where in dict.fromkeys(("cpu", device)):
        small = make(features[:2], where == "cuda")
        only = faiss.SearchParameters(sel=faiss.IDSelectorBatch(np.array([1])))  # excludes the nearest
        _, rows = small.search(features[:1], 1, params=only)
        honoured = "honoured" if rows.tolist() == [[1]] else f"IGNORED (found {rows.tolist()}): do not filter on it"
        found.append((f"faiss on {where}, filter self-test", honoured))
        large = make(features, where == "cuda")
        for size in (1, QUERIES):
            queries = features[:size]
            one = rate(lambda q=queries, large=large: large.search(q, 10), size, seconds / 2)
            found.append((f"faiss on {where}, {GALLERY} x {DIM}, {size} at once", f"{1e3 / one:.3f} ms a query"))
    return found


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Variables for the time of the block; the server's process inherits them."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def service(bundle: Bundle, providers: tuple[str, ...], seconds: float, folder: Path) -> Rows:
    """Crops a second through `resight serve`, with 32 callers."""
    from load import EMBED, IN_FLIGHT, Load, put

    from resight.demo.harness import running_server
    from resight.v1 import common_pb2, embedding_pb2

    found: Rows = []
    jpegs = draw_jpegs()
    asked = [embedding_pb2.EmbedRequest(image=common_pb2.ImageCrop(data=jpeg)).SerializeToString() for jpeg in jpegs]
    for provider in providers:
        what = f"service on {provider}, {IN_FLIGHT} in flight"
        with environment(RESIGHT_PROVIDER=provider, RESIGHT_ENGINE_CACHE=str(folder / "engines")):
            try:
                with running_server(bundle.path, folder / f"data-{provider}", max_top_k=10) as address:
                    found.append((what, f"{put(Load(address, EMBED, asked, seconds, warm_s=1.0)).rate:.0f} crops/s"))
            except ReIDError as error:
                found.append((what, f"not run: {str(error).strip().splitlines()[-1][:300]}"))
    decoded = rate(lambda: [fit(decode(jpeg), bundle.manifest.image) for jpeg in jpegs], len(jpegs), seconds)
    found.append(("decode and resize, one thread", f"{decoded:.0f} crops/s"))
    return found


def export(folder: Path) -> Bundle:
    """The built-in encoder as fp32 and fp16."""
    from resight.encoder.weights import load_weights
    from resight.exporters.export import export_encoder
    from resight.exporters.forms import ExportOptions

    initial = load_weights("builtin")
    export_encoder(
        initial.encoder,
        folder / "bundle",
        name="bench",
        training={},
        weights_licence=initial.source["licence"],
        options=ExportOptions(precisions=("fp32", "fp16")),
    )
    return open_bundle(folder / "bundle")
