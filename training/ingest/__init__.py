"""Ingest of footage: sources, detectors, tracks, sampling, and crops of collections."""
