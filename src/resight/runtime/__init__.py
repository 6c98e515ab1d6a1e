"""Runtimes that compute features with a bundle: onnxruntime and TensorRT."""
