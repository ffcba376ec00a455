"""GGUF files for tests: small real models, and headers byte by byte.

`tiny_gguf` writes a model that llama-server loads and generates with: random weights from a fixed
seed, a byte-level BPE vocabulary, so any text can be asked and equal arguments give equal files.
What it says is gibberish, but printable: at temperature 0 it never ends a text by itself, so an
answer has as many tokens as were asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from p2pmesh.errors import ConfigError, MeshError, ModelError
from p2pmesh.models.gguf import Header, TensorInfo, Value
from p2pmesh.models.tensors import tensor_bytes

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
POOLING = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}
DEADLINE_MS = 2000  # for one Hypothesis example: they take 1 ms, unless the machine is busy
HEADS, KV_HEADS, HEAD_WIDTH = 4, 2, 16
WIDTH, FEED_FORWARD = HEADS * HEAD_WIDTH, 128
VOCABULARY_MIN = len(SPECIAL) + 256


def tiny_gguf(
    path: Path,
    *,
    arch: str = "llama",
    layers: int = 2,
    name: str = "tiny test model",
    chat_template: str | None = CHATML,
    vocab: int = 320,
    context: int = 4096,
    pooling: str | None = None,
    experts: int = 0,
    feed_forward: int = FEED_FORWARD,
    seed: int = 1,
    split_tensors: int = 0,
    half: bool = False,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write a small model; about 0.5 MB in 10 ms.

    Args:
        path: The file. With `split_tensors` its stem names the parts.
        arch: "llama" and "qwen3" can be loaded; for others only the keys are renamed.
        layers: Transformer blocks.
        name: `general.name`.
        chat_template: None makes a completion model.
        vocab: Tokens, at least 259: three special ones, the bytes, then merged letters.
        context: `context_length`, in tokens.
        pooling: "mean" and others of `POOLING` make an embedding model, "rank" a reranker
            (which llama-server loads as "qwen3" only).
        experts: More than 0 makes a mixture of experts, of which 2 are used.
        feed_forward: Width of the inner layers, 768 bytes for each unit of it.
        seed: Equal seeds make equal weights; another one makes another digest.
        split_tensors: Tensors per part; 0 writes one file.
        half: Matrices of 16 bit floats in place of 32.
        extra: More keys: texts, whole numbers, or lists of them.

    Returns:
        The file, or the first part.
    """
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split_tensors)
    writer.add_name(name)
    kind = gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32
    writer.add_file_type(kind)
    writer.add_block_count(layers)
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_key_length(HEAD_WIDTH)
    writer.add_value_length(HEAD_WIDTH)
    writer.add_rope_dimension_count(HEAD_WIDTH)
    writer.add_vocab_size(vocab)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    if pooling is not None:
        writer.add_uint32(f"{arch}.pooling_type", POOLING[pooling])
    if pooling == "rank":
        writer.add_array(f"{arch}.classifier.output_labels", ["yes", "no"])
    add_vocabulary(writer, vocab)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for key, value in (extra or {}).items():
        _add(writer, key, value)
    for tensor, values in _weights(
        layers, vocab, experts, feed_forward, seed, rank=pooling == "rank", normed=arch == "qwen3"
    ):
        is_half = half and values.ndim > 1
        writer.add_tensor(tensor, values.astype(np.float16) if is_half else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case str():
            writer.add_string(key, value)
        case int():
            writer.add_uint32(key, value)
        case _:
            writer.add_array(key, value)


def _byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of the bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def add_vocabulary(writer: gguf.GGUFWriter, vocab: int) -> None:
    assert vocab >= VOCABULARY_MIN, "the bytes and the special tokens need room"
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    pairs = [(a, b) for a in letters for b in letters][: vocab - VOCABULARY_MIN]
    tokens = [*SPECIAL, *_byte_tokens(), *(a + b for a, b in pairs)]
    tokens += [f"<unused{index}>" for index in range(vocab - len(tokens))]
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (vocab - 3)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{a} {b}" for a, b in pairs] or ["e t"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def _weights(
    layers: int, vocab: int, experts: int, feed_forward: int, seed: int, *, rank: bool, normed: bool
) -> Iterable[tuple[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    rng = np.random.default_rng(seed)

    def random(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)

    output = random(vocab, WIDTH)
    # Logit 0 for whatever is not a printable ASCII byte: the greatest of 94 others is above it.
    output[[i for i in range(vocab) if not 3 + 0x21 <= i < 3 + 0x7F]] = 0
    yield "token_embd.weight", random(vocab, WIDTH)
    yield "output_norm.weight", np.ones(WIDTH, np.float32)
    yield "output.weight", output
    if rank:
        yield "cls.output.weight", random(2, WIDTH)
    for layer in range(layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", np.ones(WIDTH, np.float32)
        yield block + "attn_q.weight", random(HEADS * HEAD_WIDTH, WIDTH)
        yield block + "attn_k.weight", random(KV_HEADS * HEAD_WIDTH, WIDTH)
        yield block + "attn_v.weight", random(KV_HEADS * HEAD_WIDTH, WIDTH)
        yield block + "attn_output.weight", random(WIDTH, HEADS * HEAD_WIDTH)
        if normed:
            yield block + "attn_q_norm.weight", np.ones(HEAD_WIDTH, np.float32)
            yield block + "attn_k_norm.weight", np.ones(HEAD_WIDTH, np.float32)
        yield block + "ffn_norm.weight", np.ones(WIDTH, np.float32)
        for part, shape in (
            ("gate", (feed_forward, WIDTH)),
            ("up", (feed_forward, WIDTH)),
            ("down", (WIDTH, feed_forward)),
        ):
            if experts:
                yield f"{block}ffn_{part}_exps.weight", random(experts, *shape)
            else:
                yield f"{block}ffn_{part}.weight", random(*shape)
        if experts:
            yield block + "ffn_gate_inp.weight", random(experts, WIDTH)


# Headers byte by byte, for what no honest writer writes.


def packed_string(text: str | bytes) -> bytes:
    """A string as GGUF stores it."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def packed_key(key: str | bytes, kind: int, payload: bytes) -> bytes:
    """A metadata entry whose value has been packed already."""
    return packed_string(key) + struct.pack("<I", kind) + payload


def packed_strings(texts: Sequence[str | bytes]) -> bytes:
    """The payload of an array of strings."""
    return struct.pack("<IQ", 8, len(texts)) + b"".join(packed_string(text) for text in texts)


def packed_tensor(name: str | bytes, shape: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    """A row of the tensor table."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return packed_string(name) + sizes + struct.pack("<IQ", kind, offset)


def packed_file(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    *,
    version: int = 3,
    data_bytes: int = 0,
    alignment: int = 32,
) -> bytes:
    """A whole file; its tensors' data are zeros."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    header += b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + bytes(data_bytes)


def large_header(vocabulary: int = 150_000, tensors: int = 700) -> bytes:
    """The size of header that today's large models have: tokens, types, merges, tensors."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 14, vocabulary)
    tokens = [b"t" * int(length) for length in lengths]
    merges = [b"m" * int(length) + b" n" for length in lengths]
    keys = [
        packed_key("general.architecture", 8, packed_string("llama")),
        packed_key("llama.block_count", 4, struct.pack("<I", 80)),
        packed_key("llama.context_length", 4, struct.pack("<I", 131072)),
        packed_key("llama.embedding_length", 4, struct.pack("<I", 8192)),
        packed_key("llama.attention.head_count", 4, struct.pack("<I", 64)),
        packed_key("llama.attention.head_count_kv", 4, struct.pack("<I", 8)),
        packed_key("tokenizer.ggml.tokens", 9, packed_strings(tokens)),
        packed_key(
            "tokenizer.ggml.token_type",
            9,
            struct.pack("<IQ", 5, vocabulary) + bytes(4 * vocabulary),
        ),
        packed_key("tokenizer.ggml.merges", 9, packed_strings(merges)),
    ]
    rows = [
        packed_tensor(f"blk.{index % 80}.part_{index}.weight", [32], 8, index * 64)
        for index in range(tensors)
    ]
    return packed_file(keys, rows, data_bytes=tensors * 64)


# Headers as values, for what is computed from them.


def header_of(
    metadata: Mapping[str, Value | None] | None = None,
    tensors: Sequence[tuple[str, tuple[int, ...]]] = (("blk.0.w", (64,)), ("token_embd", (64,))),
    *,
    arch: str = "llama",
    kind: int = 8,
) -> Header:
    """A header with what a card needs.

    Args:
        metadata: Whole keys, which add to or replace the usual ones; None as a value removes one.
        tensors: Names and shapes.
        arch: `general.architecture`.
        kind: Type of all tensors, Q8_0 unless told.
    """
    usual: dict[str, Value | None] = {
        "general.architecture": arch,
        f"{arch}.block_count": 1,
        f"{arch}.context_length": 2048,
        f"{arch}.embedding_length": 64,
        f"{arch}.attention.head_count": 4,
        **(metadata or {}),
    }
    rows: list[TensorInfo] = []
    offset = 0
    for name, shape in tensors:
        size = tensor_bytes(name, shape, kind)
        rows.append(TensorInfo(name=name, shape=shape, type=kind, offset=offset, size_bytes=size))
        offset += size + -size % 32
    return Header(
        version=3,
        alignment=32,
        metadata={key: value for key, value in usual.items() if value is not None},
        tensors=tuple(rows),
        data_offset=1024,
        size_bytes=1024 + offset,
    )


def split(folder: Path, name: str = "big") -> list[Path]:
    """A small model in several parts."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_gguf(folder / f"{name}.gguf", split_tensors=8)
    return sorted(folder.glob(f"{name}-*.gguf"))


def other_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Good GGUF files that cannot be served alone, each with words that say what they are."""
    folder.mkdir(exist_ok=True)
    keys = {
        "mmproj": ({"general.architecture": "clip", "general.type": "mmproj"}, "projector"),
        "lora": ({"general.architecture": "llama", "general.type": "adapter"}, "LoRA adapter"),
        "imatrix": ({"general.type": "imatrix", "general.architecture": "x"}, "importance matrix"),
        "flux": ({"general.architecture": "flux"}, "images or video"),
        "nameless": ({"general.name": "unet"}, "does not name its architecture"),
        "speech": ({"general.architecture": "speech"}, "no language model"),
    }
    found: dict[str, tuple[Path, str]] = {}
    for name, (metadata, words) in keys.items():
        path = folder / f"{name}.gguf"
        packed = [packed_key(key, 8, packed_string(value)) for key, value in metadata.items()]
        path.write_bytes(packed_file(packed, [packed_tensor("w", [32])], data_bytes=128))
        found[name] = (path, words)
    return found


def bad_files(folder: Path) -> dict[str, tuple[Path, type[MeshError], str]]:
    """Paths of which no model can be opened, each with the error and words that say why."""
    folder.mkdir(exist_ok=True)
    good = tiny_gguf(folder / "good.gguf").read_bytes()
    contents = {
        "empty": (b"", "is empty"),
        "zip": (b"PK\x03\x04" * 9, "not a GGUF file"),
        "cut": (good[: len(good) // 2], "download it again"),
        "cutheader": (good[:500], "ends inside its header"),
        "clip": (
            packed_file([packed_key("general.architecture", 8, packed_string("clip"))]),
            "projector",
        ),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    }
    found: dict[str, tuple[Path, type[MeshError], str]] = {}
    for name, (content, words) in contents.items():
        path = folder / f"{name}.gguf"
        path.write_bytes(content)
        found[name] = (path, ModelError, words)
    found["missing"] = (folder / "none.gguf", ConfigError, "no model file")
    found["under a file"] = (folder / "good.gguf" / "x", ConfigError, "no model file")
    found["folder"] = (folder, ConfigError, "is a folder")
    return found
