"""The cycle of a site: every night it adapts the model to new footage and promotes it if it is better, without labels.

The conductor runs every stage in its own process and records the outcomes in a small SQLite file, so that a killed
cycle can be resumed. The cycle uses the other packages only through files, commands and RPC; docs/cycle.md is the
guide.
"""
