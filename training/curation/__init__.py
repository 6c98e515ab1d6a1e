"""Which crops are fit to learn from and to judge on."""
