"""Who a node is: keys, ids, and the proof of them on a connection. Pure."""
