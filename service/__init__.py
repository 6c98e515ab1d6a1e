"""A bundle answers requests. Nothing here imports torch."""
