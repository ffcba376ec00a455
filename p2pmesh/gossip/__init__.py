"""How records spread and how failures are noticed. Pure."""
