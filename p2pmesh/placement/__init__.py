"""Who should serve what: one pure function of the facts. Pure."""
