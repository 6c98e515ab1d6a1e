"""Crops on disk: the store, data sets, links, retention."""
