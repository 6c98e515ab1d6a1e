"""Feature extraction from a store, in one or several processes."""
