"""Importance matrices: what llama-imatrix saw of a model's experts while text ran through it.

Shell: reads files. In llama.cpp's GGUF form, the statistics of a matrix of experts are two tensors
of 32 bit floats: `NAME.in_sum2`, for each expert the sums of the squared inputs of its columns, and
`NAME.counts`, the tokens that reached it. Only the last matrices of the experts are read
(`ffn_down_exps`): their inputs are what the neurons of the experts put out.

Files come from anywhere, so all of it is checked against the model that it is said to be of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from p2pmesh.errors import LocalError, ModelError
from p2pmesh.models.gguf import MAGIC, Header
from p2pmesh.models.metadata import LAYERS_MAX, Metadata
from p2pmesh.models.slice import read_layout
from p2pmesh.models.store import ModelFile, read_header
from p2pmesh.models.tensors import TensorInfo, layer_of

FLOAT32 = 0  # GGML's number of this type
SUFFIX = ".ffn_down_exps.weight"

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
Doubles: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DownTensor:
    """Where the last matrices of one layer's experts lie.

    Attributes:
        path: The file, or the part of it that holds them.
        at_bytes: From the start of that file.
        info: Shape [width of an expert, width of the model, experts].
    """

    path: Path
    at_bytes: int
    info: TensorInfo

    @property
    def width(self) -> int:
        """Neurons of one expert."""
        return self.info.shape[0]

    @property
    def experts(self) -> int:
        """Experts of the layer."""
        return self.info.shape[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStatistics:
    """What was seen of one layer's experts.

    Attributes:
        counts: Tokens that reached each expert, [experts].
        in_sum2: Sums of the squares of what each neuron put out, [experts, width].
    """

    counts: Doubles
    in_sum2: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Imatrix:
    """The statistics of all layers with experts, by the number of the layer.

    Attributes:
        chunks: Pieces of text that ran through the model.
    """

    chunks: int
    layers: Mapping[int, LayerStatistics]


def down_tensors(model: ModelFile) -> dict[int, DownTensor]:
    """Return the last matrices of a model's experts by the number of their layer, ascending.

    Layers that predict further tokens (NextN) are left out, because no text runs through them and
    nothing is known of them.

    Raises:
        ModelError: The model has no experts, damaged ones, or such that no shard can be cut of it.
        LocalError: The system does not let it be read.
    """
    read_layout(model)  # refuses what no shard can be cut of; all layers have equally many experts
    headers = [read_header(path) for path in model.parts]
    ends = _nextn_start(headers[0])
    found: dict[int, DownTensor] = {}
    for path, header in zip(model.parts, headers, strict=True):
        for info in header.tensors:
            layer = layer_of(info.name)
            if layer is None or layer >= ends or info.name != f"blk.{layer}{SUFFIX}":
                continue
            at_bytes = header.data_offset + info.offset
            found[layer] = DownTensor(path=path, at_bytes=at_bytes, info=info)
    shapes = {tensor.info.shape for tensor in found.values()}
    if len(shapes) != 1 or any(len(shape) != 3 or 0 in shape for shape in shapes):
        raise ModelError(f"{model.parts[0]} cannot be ranked: its layers differ in their experts")
    return dict(sorted(found.items()))


def _nextn_start(header: Header) -> int:
    """Return the number of layers that text runs through."""
    facts = Metadata(header)
    layers = facts.number("block_count", LAYERS_MAX, least=1)
    return layers - facts.number("nextn_predict_layers", layers, default=0)


def read_imatrix(path: Path, tensors: Mapping[int, DownTensor]) -> Imatrix:
    """Return the statistics in a file, which must be of the model with these tensors.

    Raises:
        ModelError: It is no importance matrix, a damaged one, or one of another model.
        LocalError: The system does not let it be read.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ModelError(
                    f"{path} cannot be used: it is no GGUF file; llama-imatrix --in-file FILE "
                    "--output-format gguf makes one of an importance matrix of the old form"
                )
            return _read(path, file, read_header(path), tensors)
    except OSError as exc:
        raise LocalError(f"Cannot read {path} ({exc.strerror}); check the path") from exc


def saved_chunks(path: Path) -> int:
    """Return the pieces of text behind a file that llama-imatrix may be writing at this moment.

    0 when there is no whole file yet.
    """
    try:
        return _chunks(read_header(path)) if path.exists() else 0
    except (ModelError, LocalError):
        return 0


def _chunks(header: Header) -> int:
    value = header.metadata.get("imatrix.chunk_count")
    return value if isinstance(value, int) and value > 0 else 0


def _read(path: Path, file: BinaryIO, header: Header, tensors: Mapping[int, DownTensor]) -> Imatrix:
    if header.metadata.get("general.type") != "imatrix":
        raise ModelError(f"{path} cannot be used: it is no importance matrix")
    rows = {info.name: info for info in header.tensors}
    known = {f"{tensor.info.name}.in_sum2" for tensor in tensors.values()}
    foreign = {name for name in rows if name.endswith(f"{SUFFIX}.in_sum2")} - known
    if foreign:
        raise ModelError(
            f"{path} is of another model: this one has no experts for {min(foreign)!r}"
        )
    layers = {}
    for layer, tensor in tensors.items():
        name, experts = tensor.info.name, tensor.experts
        sums = _values(path, file, header, rows.get(f"{name}.in_sum2"), (tensor.width, experts))
        counts = _values(path, file, header, rows.get(f"{name}.counts"), (1, experts))
        if sums is None or counts is None:
            raise ModelError(
                f"{path} cannot be used: it lacks the statistics of {name!r}, or has those of a "
                "tensor of another shape; it is of another model"
            )
        layers[layer] = LayerStatistics(
            counts=counts.astype(np.float64).reshape(experts),
            in_sum2=sums.reshape(experts, tensor.width),
        )
    return Imatrix(chunks=_chunks(header), layers=layers)


def _values(
    path: Path, file: BinaryIO, header: Header, info: TensorInfo | None, shape: Sequence[int]
) -> Floats | None:
    """Return the numbers of a tensor; None unless it is there with this shape."""
    if info is None or info.shape != tuple(shape) or info.type != FLOAT32:
        return None
    file.seek(header.data_offset + info.offset)
    values = np.frombuffer(file.read(info.size_bytes), np.dtype("<f4"))
    if len(values) != info.elements or not np.isfinite(values).all() or (values < 0).any():
        raise ModelError(f"{path} cannot be used: {info.name!r} is damaged")
    return values
