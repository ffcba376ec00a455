"""The metadata of a GGUF header, read with bounds.

Pure. Every number is checked to be one and to be possible before anything is computed from it.
What llama.cpp takes for granted when a key is missing is taken for granted here as well.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Literal, cast

from p2pmesh.errors import ModelError
from p2pmesh.models.gguf import Header, Skipped
from p2pmesh.models.tensors import TensorInfo, type_name
from p2pmesh.wire.text import plain_text

Modality = Literal["chat", "completion", "embedding", "rerank"]
TEXT = "text"

LAYERS_MAX = 1000  # the deepest models have about 130; keeps a card within one record
EXPERTS_MAX = 65_536
CONTEXT_MAX = 2**31 - 1  # llama.cpp counts tokens in 32 bits
WIDTH_MAX = 2**20  # of an embedding or a head; the widest models have about 20,000
HEADS_MAX = 2**16
KV_NUMBER_BYTES = 2  # f16

# Architectures that read a text as a whole and cannot write one (llama.cpp's list).
_ENCODERS = {
    "bert",
    "modern-bert",
    "nomic-bert",
    "nomic-bert-moe",
    "neo-bert",
    "jina-bert-v2",
    "jina-bert-v3",
    "eurobert",
    "gemma-embedding",
    "llama-embed",
    "t5encoder",
}
_POOLING_NONE, _POOLING_RANK = 0, 4  # llama.cpp: enum llama_pooling_type
# GGUF files that are no language models, by architecture or type: what lies beside models, and
# what programs for images write.
_OTHER_KINDS = {
    "clip": "a vision or audio projector",
    "mmproj": "a vision or audio projector",
    "adapter": "a LoRA adapter",
    "imatrix": "an importance matrix",
    "wavtokenizer-dec": "an audio decoder",
    "eagle3": "a draft head for speculative decoding",
    "dflash": "a draft head for speculative decoding",
    **dict.fromkeys(
        (
            "aura", "cosmos", "flux", "hidream", "hyvid", "ltxv", "lumina2", "qwen_image", "sd1",
            "sd3", "sdxl", "wan",
        ),
        "a model for images or video",
    ),
}  # fmt: skip


class OtherKindError(ModelError):
    """A good GGUF file of a kind that cannot be served alone; the user keeps it where it is."""


class Metadata:
    """The metadata of a header, read with bounds. Keys without a prefix are the architecture's."""

    def __init__(self, header: Header) -> None:
        self._metadata = header.metadata
        self.architecture = plain_text(self.text("general.architecture"), 64)
        if not self.architecture:
            raise OtherKindError("it does not name its architecture; it is no language model")

    def refuse_others(self) -> None:
        """Raise `OtherKindError` for GGUF files that are no language models."""
        for key in ("general.architecture", "general.type"):
            what = _OTHER_KINDS.get(self.text(key))
            if what:
                raise OtherKindError(f"it is {what}, which cannot be served alone")

    def has(self, key: str) -> bool:
        """Whether the header has this key, whatever its value."""
        return key in self._metadata

    def text(self, key: str) -> str:
        """A text, "" when it is missing or something else."""
        value = self._metadata.get(key, "")
        return value if isinstance(value, str) else ""

    def _checked(self, key: str, value: object, limit: int, least: int = 0) -> int:
        # A bool is an int in Python; in a header it is another type in the wrong place.
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= limit:
            raise ModelError(
                f"its {key} is {value!r} ({least} to {limit} is possible); it is damaged or forged"
            )
        return value

    def number(self, key: str, limit: int, *, least: int = 0, default: int | None = None) -> int:
        """A number from `least` to `limit`; `default` when missing, which None forbids."""
        full = f"{self.architecture}.{key}"
        value = self._metadata.get(full, default)
        if value is None:
            raise OtherKindError(
                f"its header lacks {full}; it is no language model p2pmesh can serve"
            )
        return self._checked(full, value, limit, least)

    def per_layer(self, key: str, limit: int, layers: int, *, default: int) -> list[int]:
        """A value that is one number for all layers, or a list of one for each."""
        full = f"{self.architecture}.{key}"
        value = self._metadata.get(full, default)
        if not isinstance(value, tuple):
            return [self._checked(full, value, limit)] * layers
        if len(value) < layers:
            raise ModelError(f"its {full} has {len(value)} entries for {layers} layers")
        return [self._checked(full, entry, limit) for entry in value[:layers]]

    def kv_layer_bytes(self, layers: int) -> tuple[int, ...]:
        """Return the bytes that each layer's cache needs for one token, as f16."""
        if self.architecture in _ENCODERS:
            return (0,) * layers  # they see the whole text at once and keep nothing
        heads = self.per_layer("attention.head_count", HEADS_MAX, layers, default=0)
        width = self.number("embedding_length", WIDTH_MAX, least=1)
        usual = width // max(*heads, 1)
        key = self.number("attention.key_length", WIDTH_MAX, default=usual)
        value = self.number("attention.value_length", WIDTH_MAX, default=usual)
        if self.has(f"{self.architecture}.attention.key_length_mla"):
            value = 0  # latent attention: values are a view of the keys
        kv_heads = self.per_layer("attention.head_count_kv", HEADS_MAX, layers, default=max(heads))
        attending = self._attending(layers)
        each = (key + value) * KV_NUMBER_BYTES
        return tuple(count * each * on for count, on in zip(kv_heads, attending, strict=True))

    def _attending(self, layers: int) -> list[bool]:
        """Which layers keep a cache: hybrids have linear attention in the others."""
        recurrent = self._metadata.get(f"{self.architecture}.attention.recurrent_layers")
        if isinstance(recurrent, tuple) and len(recurrent) >= layers:
            return [not entry for entry in recurrent[:layers]]
        every = self.number("full_attention_interval", LAYERS_MAX, least=1, default=1)
        return [(layer + 1) % every == 0 for layer in range(layers)]

    def vocabulary(self) -> int:
        """How many tokens the model knows, 0 when it does not say."""
        tokens = self._metadata.get("tokenizer.ggml.tokens", ())
        if isinstance(tokens, Skipped):
            return tokens.count
        if isinstance(tokens, tuple) and tokens:
            return len(tokens)
        return self.number("vocab_size", CONTEXT_MAX, default=0)

    def gives(self) -> Modality:
        """Return the modalities of the model's answers."""
        pooling = self.number("pooling_type", 255, default=_POOLING_NONE)
        if pooling == _POOLING_RANK:
            return "rerank"
        if pooling != _POOLING_NONE or self.architecture in _ENCODERS:
            return "embedding"
        return "chat" if self.has("tokenizer.chat_template") else "completion"

    def quantisation(self, tensors: Sequence[TensorInfo]) -> str:
        """Return the quantisation that the file states, else the type that fills most of it."""
        named = _file_types().get(cast("int", self._metadata.get("general.file_type")))
        if named:
            return named
        weight: Counter[int] = Counter()
        for tensor in tensors:
            weight[tensor.type] += tensor.size_bytes
        return type_name(max(weight, key=lambda kind: (weight[kind], kind)))


@functools.cache
def _file_types() -> dict[int, str]:
    from gguf.constants import LlamaFileType  # late, as in gguf.py

    return {
        int(kind): str(kind.name).removeprefix("MOSTLY_").removeprefix("ALL_")
        for kind in LlamaFileType
        if kind.name != "GUESSED"
    }
