"""Drawn people, cameras, streets and nights."""
