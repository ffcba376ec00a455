"""The trio shell of one node: its parts, what ties them together, and what it keeps on disk."""
