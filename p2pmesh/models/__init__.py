"""GGUF files: what they hold, what they are called, where they lie."""
