"""A checkpoint becomes a bundle; see `resight.exporters.export`."""
