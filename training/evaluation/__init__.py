"""Figures where persons are known, and their plots."""
