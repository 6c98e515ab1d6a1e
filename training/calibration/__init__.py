"""Similarity to probability, fitted without labels."""
