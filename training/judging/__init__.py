"""Whether a candidate is better, without labels."""
