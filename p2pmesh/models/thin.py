"""The file of a thin shard: all experts of a model, and of each only some neurons.

Pure. A neuron of an expert is a row of its first matrices (gate and up), an entry of their biases,
and a column of its last matrix (down). The router and everything else stay whole. A column of a
quantised matrix cannot be had alone, so neurons stay or go in blocks as that matrix stores them,
and no weight is ever decoded. llama.cpp knows one width for the experts of all layers.

Errors are clauses that go on from the model's file name, as in gguf.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from p2pmesh.errors import ModelError
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.experts import DIGEST_BYTES, layout_of
from p2pmesh.models.gguf import Header
from p2pmesh.models.importance import Ranking
from p2pmesh.models.metadata import WIDTH_MAX, Metadata
from p2pmesh.models.parts import PLACES_MAX
from p2pmesh.models.shard_file import Cut, Piece, ShardFile, Span, changed_file
from p2pmesh.models.tensors import TensorInfo, layer_of, type_block
from p2pmesh.wire.codec import encode

if TYPE_CHECKING:
    from p2pmesh.models.shard_file import Indices

# Neurons of a place where each could be had alone: rows of 16 bytes in f16, as vector units load
# them, and few enough places that each can be told from the next.
STEP_MIN = 8

_MATRIX = re.compile(r"blk\.\d+\.ffn_(gate|up|down|gate_up)_exps\.(weight|bias)")
_SCALE = re.compile(r"blk\.\d+\.ffn_\w+_exps\.(?:scale|input_scale)")
_SHARED = re.compile(r"blk\.\d+\.ffn_(?:gate|up|down)_shexp\.weight")
_DENSE = re.compile(r"blk\.\d+\.ffn_(?:gate|up|down)\.weight")
_WIDTH = "expert_feed_forward_length"
_SHARED_WIDTH = "expert_shared_feed_forward_length"
_DENSE_WIDTH = "feed_forward_length"


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinLayout:
    """The neurons of a model's experts.

    Attributes:
        experts: Of each layer that has any.
        width: Neurons of each expert.
        step: Neurons of a place; the width of a thin shard is a multiple of it.
        blocks: Neurons that stay or go together, by layer; a part of `step`.
        keys: Of the metadata, which say the width.
    """

    experts: int
    width: int
    step: int
    blocks: Mapping[int, int]
    keys: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many places there are."""
        return self.width // self.step


def thin_layout_of(headers: Sequence[Header]) -> ThinLayout:
    """Return the neurons of a model's experts.

    Args:
        headers: Of its parts, in order; the first holds the metadata.

    Raises:
        ModelError: It has no experts, or no thin shard of it would be right.
    """
    experts = layout_of(headers)
    tensors = [tensor for header in headers for tensor in header.tensors]
    matrices = {tensor.name: tensor for tensor in tensors if _axis(tensor.name) is not None}
    layers = {*experts.layers, *(layer_of(name) for name in matrices)}
    last = {f"blk.{layer}.ffn_down_exps.weight" for layer in layers}
    missing = last - set(matrices)
    if missing:
        raise ModelError(f"it lacks the tensor {min(missing)!r}; it is damaged or forged")
    widths = {matrices[name].shape[0] for name in last}
    if len(widths) != 1:
        raise ModelError(
            f"some of its experts have {min(widths)} neurons and some {max(widths)}; a thin shard "
            "has one width for all layers"
        )
    [width] = widths
    for tensor in tensors:
        _check_tensor(tensor, width, experts.count)
    blocks = dict.fromkeys(experts.layers, 1)
    for name, tensor in matrices.items():
        layer = layer_of(name)
        assert layer is not None, "the pattern names one"
        if _axis(name) == 0:
            blocks[layer] = math.lcm(blocks[layer], type_block(tensor.type))
    return ThinLayout(
        experts=experts.count,
        width=width,
        step=_step(width, blocks.values()),
        blocks=blocks,
        keys=_keys(headers[0], width, tensors),
    )


def is_of(ranking: Ranking, layout: ThinLayout) -> bool:
    """Whether a ranking is of a model with these experts and, if it names neurons, with these."""
    width = layout.width if ranking.neurons is None else ranking.neurons.width
    same = (ranking.experts, width) == (layout.experts, layout.width)
    return same and set(ranking.layers) <= set(layout.blocks)


def _axis(name: str) -> int | None:
    """The axis of a tensor along which its neurons lie; None where it has none of them."""
    match = _MATRIX.fullmatch(name)
    if not match or match[0].endswith("down_exps.bias"):
        return None
    return 0 if match[1] == "down" or match[2] == "bias" else 1


def _check_tensor(tensor: TensorInfo, width: int, experts: int) -> None:
    name, shape = tensor.name, tensor.shape
    axis = _axis(name)
    if axis is not None:
        neurons = 2 * width if ".ffn_gate_up_exps." in name else width
        expected = (*shape[:axis], neurons, *shape[axis + 1 : -1], experts)
        axes = 3 if name.endswith(".weight") else 2
        if shape != expected or len(shape) != axes or 0 in shape or max(shape) > WIDTH_MAX:
            raise ModelError(
                f"its tensor {name!r} of shape {list(shape)} is not made of {experts} experts of "
                f"{width} neurons; it is damaged or forged"
            )
    elif _SCALE.fullmatch(name) and shape != (experts,):
        raise ModelError(f"its tensor {name!r} has more than one scale for each expert")


def _step(width: int, blocks: Iterable[int]) -> int:
    """The neurons of a place: whole blocks of each layer, and no more places than may be."""
    least = math.lcm(*blocks, math.gcd(width, STEP_MIN))
    steps = (step for step in range(least, width, least) if width % step == 0)
    step = next((step for step in steps if width // step <= PLACES_MAX), width)
    if step == width:
        raise ModelError(
            f"its experts have {width} neurons, which its quantisation keeps in blocks of {least}; "
            "they cannot become thinner"
        )
    return step


def _keys(header: Header, width: int, tensors: Sequence[TensorInfo]) -> tuple[str, ...]:
    """The keys that say how wide experts are.

    Architectures that have no key for it, and some that have, take the width of dense layers. That
    can be changed where there are no dense layers.
    """
    facts = Metadata(header)
    shared = any(_SHARED.fullmatch(tensor.name) for tensor in tensors)
    if shared and not facts.has(f"{facts.architecture}.{_SHARED_WIDTH}"):
        raise ModelError(
            f"it has shared experts without {_SHARED_WIDTH}: their width follows from that of the "
            "other experts, so that these cannot become thinner"
        )
    dense = any(_DENSE.fullmatch(tensor.name) for tensor in tensors)
    known = [_WIDTH] if dense else [_WIDTH, _DENSE_WIDTH]
    stated = {key: header.metadata.get(f"{facts.architecture}.{key}") for key in known}
    if stated[_WIDTH] not in (None, 0, width):
        raise ModelError(
            f"its experts have {width} neurons and its {_WIDTH} is {stated[_WIDTH]!r}; only one "
            "number for all layers can be changed"
        )
    keys = tuple(f"{facts.architecture}.{key}" for key in known if stated[key] == width)
    if not keys:
        raise ModelError(
            f"no number of its header says that its experts have {width} neurons, so that none "
            "can be changed"
        )
    return keys


def thin_file(
    headers: Sequence[Header],
    *,
    layout: ThinLayout,
    width: int,
    kept: Callable[[int], Indices],
) -> ShardFile:
    """Return the thin shard of a model that keeps these neurons.

    Args:
        headers: Of the model's files, in order; the first holds the metadata.
        layout: Of the same model.
        width: Neurons that each expert keeps; a multiple of the layout's step.
        kept: Returns for a layer the neurons of each expert, ascending and in whole blocks of the
            layer, [experts, width]. Called when the bytes of a tensor are asked for, so that the
            neurons of all layers are never in memory together.

    Raises:
        ModelError: The model is another one.
    """
    assert 0 < width <= layout.width
    assert width % layout.step == 0, "a place is never divided"
    if thin_layout_of(headers) != layout:
        raise ModelError("its experts changed while it was read")

    def sliced(tensor: TensorInfo, whole: Span) -> tuple[tuple[int, ...], Iterable[Piece]]:
        axis, layer = _axis(tensor.name), layer_of(tensor.name)
        if axis is None or layer is None:
            return tensor.shape, (whole,)
        shape = list(tensor.shape)
        shape[axis] = shape[axis] // layout.width * width
        return tuple(shape), _Columns(tensor, whole, axis, layout, kept)

    return changed_file(headers, dict.fromkeys(layout.keys, width), sliced)


@dataclass(frozen=True, slots=True)
class _Columns:
    """The kept neurons of one tensor, expert by expert; those of a layer are asked for late.

    Where neurons are rows of a matrix, a whole row is a column of a matrix with one row. Gate and
    up in one tensor are two of these rows.
    """

    tensor: TensorInfo
    whole: Span
    axis: int
    layout: ThinLayout
    kept: Callable[[int], Indices]

    def __iter__(self) -> Iterator[Cut]:
        layer = layer_of(self.tensor.name)
        assert layer is not None, "only tensors of layers have neurons"
        block = type_block(self.tensor.type) if self.axis == 0 else 1
        rows = math.prod(self.tensor.shape[self.axis : -1]) // self.layout.width
        columns = self.layout.width // block
        size = self.tensor.size_bytes // self.layout.experts
        for expert, neurons in enumerate(self.kept(layer)):
            yield Cut(
                part=self.whole.part,
                start=self.whole.start + expert * size,
                rows=rows,
                columns=columns,
                column_bytes=size // rows // columns,
                kept=neurons[::block] // block,
            )


def thin_digest(model: ModelDigest, ranking: str, width: int) -> str:
    """Return the key of a thin shard in a cache: 32 hexadecimal characters.

    Args:
        model: What it is cut from.
        ranking: The digest of the ranking whose neurons it keeps.
        width: Neurons of each expert.
    """
    return blake2b(encode([model, ranking, width]), digest_size=DIGEST_BYTES).hexdigest()
