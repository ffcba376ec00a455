"""How a node finds meshes on the local network: a beacon of its own, and DNS-SD."""
