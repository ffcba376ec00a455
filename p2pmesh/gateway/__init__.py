"""The OpenAI-compatible API on every node."""
