"""Evaluation on labelled sites, and its plots."""
