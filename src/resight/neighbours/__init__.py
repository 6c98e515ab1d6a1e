"""k-reciprocal neighbours: search, Jaccard distance, re-ranking."""
