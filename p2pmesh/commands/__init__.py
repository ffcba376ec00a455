"""The commands of `p2pmesh`, each in its module."""
