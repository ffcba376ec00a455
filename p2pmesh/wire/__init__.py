"""How facts and messages look as bytes. Pure."""
