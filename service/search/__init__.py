"""Queries against indexes, ranking of hits, decisions and their statistics."""
