"""Cards: what other nodes, placement and people need to know about a model.

Pure. A card is made from GGUF headers and travels in signed records, so it is small, holds only
integers and short texts, and is checked field by field when it comes from a peer. It says nothing
of where the file lies or what it is called. Sizes are bytes; keys and values of the attention
cache count as 16 bit floats, which is what llama-server stores unless told otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, NewType

from p2pmesh.errors import ModelError, PeerError
from p2pmesh.models.gguf import Header
from p2pmesh.models.metadata import (
    CONTEXT_MAX,
    EXPERTS_MAX,
    LAYERS_MAX,
    TEXT,
    WIDTH_MAX,
    Metadata,
    OtherKindError,
)
from p2pmesh.models.tensors import TensorInfo, layer_of
from p2pmesh.wire.codec import INT_MAX
from p2pmesh.wire.text import NAME_CHARACTERS_MAX, plain_text

ModelDigest = NewType("ModelDigest", str)

KV_RUNS_MAX = 160  # counts and sizes; more would not leave a card within one record
BYTES_MAX = 2**63 - 1  # what msgpack, SQL and other people's integers hold

_EXPERTS = re.compile(r"^blk\.\d+\.\w+_exps\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One model, as the mesh knows it.

    Attributes:
        architecture: llama.cpp's name of it, such as "qwen3moe".
        name: The model's own name, "" when it has none.
        layers: Transformer blocks.
        layer_bytes: Weights per block.
        other_bytes: Weights outside the blocks: embeddings, output, norms.
        size_bytes: Of the file or files.
        kv_bytes_per_token: What one token of context needs, all layers, as f16.
        experts: Per layer; 0 for a dense model.
        experts_used: Of them, for each token.
        context: Tokens the model was made for.
        width: Elements of the hidden state.
        vocabulary: Tokens the model knows.
        takes: Of what requests may be made: `text`; other modalities are kept, known or not.
        gives: What it makes of them, of `Modality` or something that a newer node knows.
        chat_template: Whether it brings one.
        parameters: Elements of all tensors.
        quantisation: Such as "Q4_K_M".
        kv_layer_bytes: `kv_bytes_per_token` per block; () where the card does not tell.
        expert_bytes: Weights of experts, all blocks, shared ones not among them.
        tensor_bytes_max: Of the largest tensor in a block; 0 where the card does not tell.
    """

    architecture: str
    name: str
    layers: int
    layer_bytes: tuple[int, ...]
    other_bytes: int
    size_bytes: int
    kv_bytes_per_token: int
    experts: int
    experts_used: int
    context: int
    width: int
    vocabulary: int
    takes: frozenset[str]
    gives: frozenset[str]
    chat_template: bool
    parameters: int
    quantisation: str
    kv_layer_bytes: tuple[int, ...] = ()
    expert_bytes: int = 0
    tensor_bytes_max: int = 0


def card_of(headers: Sequence[Header]) -> Card:
    """The card of a model.

    Args:
        headers: Of its parts, in order; the first holds the metadata.

    Raises:
        ModelError: No model that could be served, or its parts do not belong together.
    """
    assert headers, "a model has at least one file"
    facts = Metadata(headers[0])
    facts.refuse_others()
    tensors = _tensors(headers)
    layers = facts.number("block_count", LAYERS_MAX, least=1)
    layer_bytes = [0] * layers
    other_bytes = tensor_bytes_max = 0
    for tensor in tensors:
        layer = layer_of(tensor.name)
        if layer is None:
            other_bytes += tensor.size_bytes
        elif layer < layers:
            layer_bytes[layer] += tensor.size_bytes
            tensor_bytes_max = max(tensor_bytes_max, tensor.size_bytes)
        else:
            raise ModelError(
                f"tensor {tensor.name!r} lies beyond its {layers} layers; it is damaged or forged"
            )
    kv_layer_bytes = facts.kv_layer_bytes(layers)
    return Card(
        architecture=facts.architecture,
        name=plain_text(facts.text("general.name")),
        layers=layers,
        layer_bytes=tuple(layer_bytes),
        other_bytes=other_bytes,
        size_bytes=sum(header.size_bytes for header in headers),
        kv_bytes_per_token=sum(kv_layer_bytes),
        experts=facts.number("expert_count", EXPERTS_MAX, default=0),
        experts_used=max(facts.per_layer("expert_used_count", EXPERTS_MAX, layers, default=0)),
        context=facts.number("context_length", CONTEXT_MAX, least=1),
        width=facts.number("embedding_length", WIDTH_MAX, least=1),
        vocabulary=facts.vocabulary(),
        takes=frozenset({TEXT}),
        gives=frozenset({facts.gives()}),
        chat_template=facts.has("tokenizer.chat_template"),
        parameters=sum(tensor.elements for tensor in tensors),
        quantisation=facts.quantisation(tensors),
        kv_layer_bytes=kv_layer_bytes if len(_runs(kv_layer_bytes)) <= KV_RUNS_MAX else (),
        expert_bytes=sum(one.size_bytes for one in tensors if _EXPERTS.search(one.name)),
        tensor_bytes_max=tensor_bytes_max,
    )


class Family(NamedTuple):
    """What the quantisations of one model of experts have in common.

    The name tells finetunes of one base apart, which have equal numbers. The number of elements is
    not among them: some quantisations have tensors of scales besides.
    """

    name: str
    architecture: str
    layers: int
    width: int
    vocabulary: int
    experts: int
    experts_used: int
    context: int


def family_of(card: Card) -> Family | None:
    """Return the family of a model; None for one without experts, or without a name of its own."""
    if not card.experts or not card.name:
        return None
    return Family(*(getattr(card, field) for field in Family._fields))


def _tensors(headers: Sequence[Header]) -> list[TensorInfo]:
    """All tensors of all parts, checked to be the parts of one model."""
    count = headers[0].metadata.get("split.count", 1)
    if count != len(headers) and not (count == 0 and len(headers) == 1):
        raise ModelError(f"it is one of {count} parts of a model, and {len(headers)} are here")
    for number, header in enumerate(headers if len(headers) > 1 else ()):
        if header.metadata.get("split.no") != number or header.metadata.get("split.count") != count:
            raise ModelError(f"part {number + 1} does not belong to this model; download it again")
    tensors = [tensor for header in headers for tensor in header.tensors]
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ModelError("two of its parts hold the same tensor; download them again")
    promised = headers[0].metadata.get("split.tensors.count", len(tensors))
    if len(headers) > 1 and promised != len(tensors):
        raise ModelError(
            f"its parts hold {len(tensors)} of {promised} tensors; download them again"
        )
    if not tensors:
        raise OtherKindError("it holds no weights, only a vocabulary; get the model itself")
    return tensors


# Memory beside weights and cache, in llama.cpp's terms. Rough on purpose and never too small for
# usual models; the engine's own report replaces it once a model has run.
UBATCH = 512  # tokens that llama-server computes at once
CONTEXT_STEP = 256  # it rounds the cache up to this
LIVE_STATES = 8  # hidden states of a batch beside its logits; 1 or 2 were seen, more with experts
ENGINE_BYTES = 128 * 2**20  # program, vocabulary, HTTP server: 60 MiB seen, more when embedded


def need_bytes(card: Card, *, context: int) -> int:
    """Memory to serve a model whole on one node.

    weights + cache + batch + engine, where cache = kv_bytes_per_token x tokens and batch =
    512 x (4 x (vocabulary + 8 x width) + 2 x tokens): logits and hidden states as 32 bit floats,
    the attention mask as 16 bit floats. Tokens are those of the context, rounded up.

    Args:
        card: The model.
        context: Tokens that its requests share.
    """
    cache = card.kv_bytes_per_token * _tokens(context)
    batch = batch_bytes(card, context=context)
    return card.size_bytes + cache + batch + ENGINE_BYTES


def batch_bytes(card: Card, *, context: int, logits: bool = True) -> int:
    """Memory for the tokens that are computed at once; without `logits` for layers alone."""
    floats = LIVE_STATES * card.width + (card.vocabulary if logits else 0)
    return UBATCH * (4 * floats + 2 * _tokens(context))


def cache_bytes(card: Card, *, context: int) -> tuple[int, ...]:
    """The cache of each layer; alike where the card does not tell them apart."""
    each = card.kv_layer_bytes
    if len(each) != card.layers:
        each = (-(-card.kv_bytes_per_token // max(card.layers, 1)),) * card.layers
    return tuple(one * _tokens(context) for one in each)


def read_bytes(card: Card) -> tuple[int, ...]:
    """The weights of each layer that one token reads: of experts only those that it uses."""
    idle = max(card.experts - card.experts_used, 0)
    unread = card.expert_bytes * idle // max(card.experts, 1)
    total = max(sum(card.layer_bytes), 1)
    return tuple(one - min(unread * one // total, one) for one in card.layer_bytes)


def largest_tensor_bytes(card: Card) -> int:
    """The largest tensor in a layer: all of it is in memory twice while a stage loads it."""
    return card.tensor_bytes_max or max(card.layer_bytes, default=0)


def _tokens(context: int) -> int:
    return -(-context // CONTEXT_STEP) * CONTEXT_STEP


def to_wire(card: Card) -> dict[str, Any]:
    """The card as plain values for the codec; equal layers are counted, not repeated."""
    wire = {field.name: getattr(card, field.name) for field in fields(card)}
    wire |= {"takes": sorted(card.takes), "gives": sorted(card.gives)}
    wire["layer_bytes"] = _runs(card.layer_bytes)
    wire["kv_layer_bytes"] = _runs(card.kv_layer_bytes)
    del wire["layers"]  # the runs add up to it
    return wire


def _runs(values: Sequence[int]) -> list[int]:
    runs: list[int] = []
    for value in values:
        if runs and runs[-1] == value:
            runs[-2] += 1
        else:
            runs += (1, value)
    return runs


_TEXT_LIMITS = {"architecture": 64, "name": NAME_CHARACTERS_MAX, "quantisation": 32}
_NUMBER_LIMITS = {
    "other_bytes": BYTES_MAX,
    "size_bytes": BYTES_MAX,
    "kv_bytes_per_token": BYTES_MAX,
    "experts": EXPERTS_MAX,
    "experts_used": EXPERTS_MAX,
    "context": CONTEXT_MAX,
    "width": WIDTH_MAX,
    "vocabulary": CONTEXT_MAX,
    "parameters": BYTES_MAX,
    "expert_bytes": BYTES_MAX,
    "tensor_bytes_max": BYTES_MAX,
}
_NEEDED = ("size_bytes", "context")  # without them a model cannot be placed
MODALITIES_MAX = 16
MODALITY_CHARACTERS_MAX = 32


def from_wire(obj: object) -> Card:
    """The card that a peer sent.

    Fields that a newer peer added are ignored, and what it left out counts as nothing; a number
    beyond what this node knows counts as the largest that it knows, and modalities that it does not
    know stand beside those that it does.

    Raises:
        PeerError: It is no card.
    """
    if not isinstance(obj, Mapping):
        raise PeerError("a model card is not a map")
    layer_bytes = _expand(obj, "layer_bytes")
    values: dict[str, Any] = {"layers": len(layer_bytes), "layer_bytes": layer_bytes}
    values["kv_layer_bytes"] = _expand(obj, "kv_layer_bytes")
    for key, limit in _TEXT_LIMITS.items():
        text = obj.get(key, "")
        if not isinstance(text, str) or len(text) > limit or text != plain_text(text, limit):
            raise PeerError(f"a model card has a bad {key}")
        values[key] = text
    for key, limit in _NUMBER_LIMITS.items():
        number = _bounded(obj.get(key, None if key in _NEEDED else 0), key, INT_MAX)
        values[key] = min(number, limit)
    if values["context"] == 0:  # what no model has, and no engine starts with
        raise PeerError("a model card has a bad context")
    values["takes"] = _modalities(obj.get("takes", [TEXT]), "takes")
    values["gives"] = _modalities(obj.get("gives", []), "gives")
    values["chat_template"] = obj.get("chat_template", False)
    if not isinstance(values["chat_template"], bool):
        raise PeerError("a model card has a bad chat_template")
    return Card(**values)


def _modalities(value: object, key: str) -> frozenset[str]:
    if not isinstance(value, list | tuple) or len(value) > MODALITIES_MAX:
        raise PeerError(f"a model card has bad {key}")
    if not all(isinstance(one, str) and len(one) <= MODALITY_CHARACTERS_MAX for one in value):
        raise PeerError(f"a model card has bad {key}")
    return frozenset(plain_text(one, MODALITY_CHARACTERS_MAX) for one in value)


def _bounded(value: object, key: str, limit: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise PeerError(f"a model card has a bad {key}")
    return value


def _expand(obj: Mapping[Any, Any], key: str) -> tuple[int, ...]:
    runs = obj.get(key, [])
    if not isinstance(runs, list | tuple) or len(runs) % 2 or len(runs) > 2 * LAYERS_MAX:
        raise PeerError(f"a model card has bad {key}")
    layers: list[int] = []
    for count, size in zip(runs[::2], runs[1::2], strict=True):
        room = LAYERS_MAX - len(layers)
        layers += [_bounded(size, "layer size", BYTES_MAX)] * _bounded(count, "layer count", room)
    if _runs(layers) != list(runs):
        raise PeerError(f"a model card has {key} in a form of its own")
    return tuple(layers)
