"""The merged facts of the mesh, and views of them. Pure."""
