"""`make gpu` on a machine without a GPU, and tests of faiss and training on one (the runtimes have their own)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hardware import no_gpu

ROOT = Path(__file__).resolve().parents[1]
FIGURES = "<!-- figures: written by benchmarks/bench_gpu.py -->"


@pytest.mark.skipif(not no_gpu(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command",
    [["make", "--no-print-directory", "gpu"], [sys.executable, "benchmarks/bench_gpu.py"]],
    ids=["make", "bench"],
)
def test_without_a_gpu_one_line_says_so_and_nothing_is_written(command: list[str]) -> None:
    before = (ROOT / "docs/gpu.md").read_bytes()
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (answer.returncode, len(answer.stdout.splitlines())) == (0, 1), answer
    assert "no NVIDIA GPU on this machine" in answer.stdout
    assert (ROOT / "docs/gpu.md").read_bytes() == before


def test_the_page_has_its_one_place_for_figures() -> None:
    assert (ROOT / "docs/gpu.md").read_text().count(FIGURES) == 1


@pytest.mark.gpu
def test_a_gpu_index_honours_its_filter() -> None:
    faiss = pytest.importorskip("faiss", reason="faiss-gpu-cuvs is not installed")
    if not getattr(faiss, "get_num_gpus", lambda: 0)():
        pytest.skip("this faiss has no GPU: install faiss-gpu-cuvs")
    flat = faiss.IndexFlatIP(8)
    flat.add(np.eye(2, 8, dtype=np.float32))
    options = faiss.GpuClonerOptions()
    options.use_cuvs = True
    resources = faiss.StandardGpuResources()
    index = faiss.index_cpu_to_gpu(resources, 0, flat, options)
    only = faiss.SearchParameters(sel=faiss.IDSelectorBatch(np.array([1])))
    _, rows = index.search(np.eye(1, 8, dtype=np.float32), 1, params=only)
    assert rows.tolist() == [[1]]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_on_a_gpu_lowers_its_loss(precision: str) -> None:
    import torch

    from resight.encoder.model import Encoder, EncoderConfig
    from resight.training.features.extract import autocast

    if not torch.cuda.is_available():
        pytest.skip(f"this torch ({torch.__version__}) sees no GPU")
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig()).to("cuda").train()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    images = torch.rand(8, 3, encoder.config.image.height, encoder.config.image.width, device="cuda")
    target = torch.randn(8, encoder.feature_dim, device="cuda")
    losses = []
    for _ in range(20):
        with autocast("cuda", precision):  # type: ignore[arg-type]
            views = encoder(images)
        loss = (views[0].float() - target).pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
