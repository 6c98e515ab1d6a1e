"""Checks for hardware that some tests need."""

from __future__ import annotations


def no_gpu() -> str:
    """Why a test that needs an NVIDIA GPU cannot run here; nothing where it can."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return "needs an NVIDIA GPU; cuda-bindings is not installed, so it cannot be detected"
    error, count = runtime.cudaGetDeviceCount()
    return "" if not int(error) and count else f"needs an NVIDIA GPU; found none ({error.name})"
