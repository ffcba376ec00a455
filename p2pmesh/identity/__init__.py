"""The identity of a node: keys, ids, and the proof of them on a connection. Pure."""
