"""Placement: which node serves which model, the same answer on every node without messages.

Each node turns the signed records into `Facts`, computes `plan(facts)` and then changes only its
own processes, as `reconcile` says. There is no leader whose loss would stop this, and nothing to
agree on beyond the records themselves: equal facts give equal plan bytes on every machine. So
everything here is pure and made of integers, with total orders and no clock, no floating point,
no `hash()`, no order of arrival, and (but for `reconcile`) no idea of which node is computing.
"""
