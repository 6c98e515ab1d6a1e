"""Pseudo-labels: sparse Jaccard DBSCAN, constraints, cluster health."""
