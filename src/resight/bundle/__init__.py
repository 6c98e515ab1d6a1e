"""Bundles: a model's folder, manifest, probes, signature and graph check; does not import torch."""
