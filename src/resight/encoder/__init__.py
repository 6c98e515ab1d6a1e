"""The encoder, its weights and checkpoints: with neighbours/search the only folder of this package that loads torch."""
