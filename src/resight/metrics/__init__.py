"""Metrics of ranked lists and of open-set searches."""
