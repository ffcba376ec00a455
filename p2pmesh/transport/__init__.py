"""Links and streams between nodes: TCP, TLS, and an in-memory twin for tests."""
