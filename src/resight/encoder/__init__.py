"""The encoder, its weights and checkpoints. Imports torch, as otherwise only `resight.neighbours.search` does here."""
