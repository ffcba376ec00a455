"""The web console and the control API behind it."""
