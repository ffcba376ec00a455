"""What a model takes in stages, and what a token reads of it. Pure."""

from __future__ import annotations

from typing import NamedTuple

from p2pmesh.models.cards import (
    ENGINE_BYTES,
    Card,
    batch_bytes,
    cache_bytes,
    largest_tensor_bytes,
    need_bytes,
    read_bytes,
)

MIB = 2**20
# A program that only computes: no vocabulary, no HTTP. 5 MiB seen on a CPU, more with a driver.
STAGE_ENGINE_BYTES = 64 * MIB
HIDDEN_BYTES = 4  # elements of the hidden state travel as 32 bit floats
# llama.cpp cuts before a residual is added: two go to a stage, one comes back.
HIDDEN_STATES = 3


class Shape(NamedTuple):
    """What matters of a model for splitting it, at the context that it would have.

    Attributes:
        layer_bytes: Memory per layer, with its cache.
        layer_reads: Bytes that a token reads per layer.
        head_bytes: Memory of the head beside its layers.
        stage_bytes: Memory of any other stage beside its layers.
        hop_bytes: Hidden state that travels to a stage and back, for each token.
    """

    layer_bytes: tuple[int, ...]
    layer_reads: tuple[int, ...]
    head_bytes: int
    stage_bytes: int
    hop_bytes: int

    def need(self, first: int, last: int) -> int:
        """Return the memory of the stage with these layers; the head's begins at 0."""
        beside = self.head_bytes if first == 0 else self.stage_bytes
        return beside + sum(self.layer_bytes[first : last + 1])

    def in_steps(self, step: int) -> Shape:
        """Return the shape with `step` layers in a row made one; the last one may be of fewer."""

        def joined(values: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(sum(values[at : at + step]) for at in range(0, len(values), step))

        return self._replace(
            layer_bytes=joined(self.layer_bytes), layer_reads=joined(self.layer_reads)
        )


def shape_of(card: Card, *, context: int) -> Shape:
    """The shape of a model, of which all stages together take what it takes whole, and buffers.

    A head takes memory whatever a forged card says, so that no stage of a pipeline is free.

    Args:
        card: The model; of one that does not tell its layers there is a shape without any.
        context: Tokens that its requests share.
    """
    caches = cache_bytes(card, context=context)
    layers = tuple(map(sum, zip(card.layer_bytes, caches, strict=True)))
    return Shape(
        layer_bytes=layers,
        layer_reads=read_bytes(card),
        head_bytes=max(
            need_bytes(card, context=context) - sum(layers), card.other_bytes + ENGINE_BYTES
        ),
        stage_bytes=batch_bytes(card, context=context, logits=False)
        + largest_tensor_bytes(card)
        + STAGE_ENGINE_BYTES,
        hop_bytes=HIDDEN_STATES * card.width * HIDDEN_BYTES,
    )
