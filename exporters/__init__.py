"""A checkpoint becomes a bundle."""
