"""Generated messages and stubs of the `resight.v1` API."""
