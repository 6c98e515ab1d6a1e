"""Selecting crops: data checks, the crops of a run, and the judge's reference."""
