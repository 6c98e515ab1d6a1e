"""Vector indexes of one collection and space, and what keeps them equal to the store."""
