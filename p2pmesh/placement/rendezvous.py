"""Weighted rendezvous hashing with integers: for each model, an order of all nodes.

Pure. Every node draws a pseudo-random number u in (0, 1) for a model and scores w / -log2(u); the
highest score comes first. A node of twice the weight is first for twice as many models, and the
order of two nodes depends on nothing but those two: when a node goes, only what it had moves, and
when one comes, things move only to it. Logarithms of the C library differ between platforms, so
this one is made of integers (CRUSH's straw2 does the same).
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from p2pmesh.identity.keys import NodeId
from p2pmesh.models.cards import ModelDigest

WEIGHT_MAX = 2**32 - 1
"""Above it the order of two scores could be lost in the quotient; in MiB that is 4 PiB."""

LOG_FRACTION_BITS = 32
DRAW_BITS = 64
_DOMAIN = b"p2pmesh-place/1"
_MANTISSA_BITS = 63
_CHUNK_BITS = 4


def rank(digest: ModelDigest, weights: Iterable[tuple[NodeId, int]]) -> list[NodeId]:
    """The nodes in the order in which they should get `digest`, best first.

    Args:
        digest: The model.
        weights: Node and weight, each node once; weights are clamped to 1 … WEIGHT_MAX.
    """
    return [node for _, _, node in sorted(_place(digest, *pair) for pair in weights)]


def _place(digest: ModelDigest, node: NodeId, weight: int) -> tuple[int, int, NodeId]:
    """Return the sort key of `node`: its inverse score; the draw and the id break ties.

    The quotient keeps 64 fraction bits. Two different fractions whose denominators are below 2^32
    differ by more than 2^-64, so quotients order exactly as cross-multiplied scores would.
    """
    number = draw(digest, node)
    inverse = (neg_log2(number) << DRAW_BITS) // min(max(weight, 1), WEIGHT_MAX)
    return inverse, number, node


def draw(digest: ModelDigest, node: NodeId) -> int:
    """The 64 bit number that `node` draws for `digest`. Ids are of one length: no mix-ups."""
    data = blake2b(node + digest.encode(), digest_size=DRAW_BITS // 8, person=_DOMAIN).digest()
    return int.from_bytes(data, "big")


def neg_log2(number: int) -> int:
    """-log2((2 · number + 1) / 2^65) in units of 2^-32, rounded up, so never 0.

    Raising the mantissa to the 16th power multiplies its logarithm by 16: the whole part of the
    result is the next four bits. What is cut off in between stays far below the last bit.

    Args:
        number: 0 … 2^64 - 1; the middle of its slot is taken, so that 0 and 1 never appear.
    """
    odd = 2 * number + 1
    log = odd.bit_length() - 1
    mantissa = odd << _MANTISSA_BITS >> log
    for _ in range(LOG_FRACTION_BITS // _CHUNK_BITS):
        power = mantissa**16
        whole = power.bit_length() - 1 - 16 * _MANTISSA_BITS
        log = log << _CHUNK_BITS | whole
        mantissa = power >> (whole + 15 * _MANTISSA_BITS)
    return ((DRAW_BITS + 1) << LOG_FRACTION_BITS) - log
