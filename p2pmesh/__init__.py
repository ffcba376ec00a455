"""p2pmesh: a peer-to-peer mesh that serves language models, without a coordinator."""

__version__ = "0.1.0"
