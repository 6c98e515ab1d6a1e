"""Work that outlives a call: migrations and shadows."""
