"""Bundles: a model's folder, its manifest, probes, signature and graph check; never torch."""
