"""The cycle of a site: footage in, a better model out, every night, without anyone labelling anything.

The conductor starts every stage as a process of its own and keeps what it came to in a small SQLite file, so that a
killed cycle goes on where it was. The other rooms are met in files, commands and RPC; docs/cycle.md is the guide.
"""
