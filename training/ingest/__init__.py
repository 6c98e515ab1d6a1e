"""Footage to crops: sources, detectors, tracks, sampling."""
