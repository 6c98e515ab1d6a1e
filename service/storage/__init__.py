"""The durable gallery: SQLite schema, reads, writes, audit, erasure, snapshots."""
