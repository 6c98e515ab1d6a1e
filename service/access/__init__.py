"""Who may call: interceptors, authentication, tokens, rate limits, TLS."""
