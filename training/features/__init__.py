"""Features of a store, on one device or several processes."""
