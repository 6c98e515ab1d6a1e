"""Export of checkpoints to bundles; see `resight.exporters.export`."""
