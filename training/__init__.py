"""Unlabelled crops become a better model."""
