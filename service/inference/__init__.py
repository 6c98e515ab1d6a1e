"""From image bytes to features: decoding, batching, models."""
