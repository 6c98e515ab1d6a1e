"""Synthetic people, cameras, streets and nights."""
