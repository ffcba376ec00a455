"""Small random mixture-of-experts models in the layouts of well-known architectures.

Each is what stock llama-server loads: the tensors that its loader asks for, with random weights
from a fixed seed. Layer 0 is dense where the architecture begins with dense layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.models.builders import CHATML, HEADS, KV_HEADS, WIDTH, add_vocabulary

VOCABULARY = 320
EXPERTS, USED = 16, 4
DENSE, EXPERT = 128, 64  # widths of the inner layers
HEAD = WIDTH // HEADS
LORA, ROPE, NOPE, VALUE = 32, 16, 16, 16  # of latent attention

Array = np.ndarray[Any, Any]
Tensors = Iterator[tuple[str, tuple[int, ...]]]
"""Names within a block, and shapes as numpy has them: the slowest dimension first."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """An architecture, as llama.cpp knows it.

    Attributes:
        keys: Metadata beside what all have; a float or bool is stored as such, others as u32.
        attention: The tensors of a block before its feed-forward part.
        extra: More tensors of a block with experts.
        dense_layers: Blocks at the beginning that have no experts.
        nextn_layers: Blocks at the end that predict further tokens.
        expert_width: Of the inner layer of an expert.
        norm: The name of the norm before the feed-forward part.
    """

    architecture: str
    attention: Callable[[], Tensors]
    keys: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dense_layers: int = 0
    nextn_layers: int = 0
    expert_width: int = EXPERT
    norm: str = "ffn_norm"


def _plain(*, bias: bool = False, normed: bool = False) -> Callable[[], Tensors]:
    def tensors() -> Tensors:
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            yield f"attn_{part}.weight", (heads * HEAD, WIDTH)
            if bias:
                yield f"attn_{part}.bias", (heads * HEAD,)
            if normed and part != "v":
                yield f"attn_{part}_norm.weight", (HEAD,)
        yield "attn_output.weight", (WIDTH, HEADS * HEAD)

    return tensors


def _with_sinks() -> Tensors:
    yield from _plain(bias=True)()
    yield "attn_output.bias", (WIDTH,)
    yield "attn_sinks.weight", (HEADS,)


def _latent() -> Tensors:
    yield "attn_q_a.weight", (LORA, WIDTH)
    yield "attn_q_a_norm.weight", (LORA,)
    yield "attn_q_b.weight", (HEADS * (NOPE + ROPE), LORA)
    yield "attn_kv_a_mqa.weight", (LORA + ROPE, WIDTH)
    yield "attn_kv_a_norm.weight", (LORA,)
    yield "attn_k_b.weight", (HEADS, LORA, NOPE)
    yield "attn_v_b.weight", (HEADS, VALUE, LORA)
    yield "attn_output.weight", (WIDTH, HEADS * VALUE)


SHARED = {
    "ffn_gate_shexp.weight": (EXPERT, WIDTH),
    "ffn_up_shexp.weight": (EXPERT, WIDTH),
    "ffn_down_shexp.weight": (WIDTH, EXPERT),
}
_DEEPSEEK = {
    "attention.q_lora_rank": LORA,
    "attention.kv_lora_rank": LORA,
    "attention.head_count_kv": 1,
    "attention.key_length": LORA + ROPE,
    "attention.value_length": LORA,
    "attention.key_length_mla": NOPE + ROPE,
    "attention.value_length_mla": VALUE,
    "rope.dimension_count": ROPE,
    "leading_dense_block_count": 1,
    "expert_feed_forward_length": EXPERT,
    "expert_shared_count": 1,
    "expert_weights_scale": 1.5,
}
SOFTMAX, SIGMOID = 1, 2

LAYOUTS = {
    "mixtral": Layout(architecture="llama", attention=_plain(), expert_width=DENSE),
    "qwen2moe": Layout(
        architecture="qwen2moe",
        attention=_plain(bias=True),
        keys={
            "expert_feed_forward_length": EXPERT,
            "expert_shared_feed_forward_length": EXPERT,
        },
        extra={**SHARED, "ffn_gate_inp_shexp.weight": (WIDTH,)},
    ),
    "qwen3moe": Layout(
        architecture="qwen3moe",
        attention=_plain(normed=True),
        keys={"expert_feed_forward_length": EXPERT},
    ),
    "deepseek-v2": Layout(
        architecture="deepseek2",
        attention=_latent,
        keys={**_DEEPSEEK, "expert_gating_func": SOFTMAX},
        extra=SHARED,
        dense_layers=1,
    ),
    "deepseek-v3": Layout(
        architecture="deepseek2",
        attention=_latent,
        keys={
            **_DEEPSEEK,
            "expert_gating_func": SIGMOID,
            "expert_weights_norm": True,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
        },
        extra={**SHARED, "exp_probs_b.bias": (EXPERTS,)},
        dense_layers=1,
    ),
    "glm4moe": Layout(
        architecture="glm4moe",
        attention=_plain(bias=True, normed=True),
        keys={
            "leading_dense_block_count": 1,
            "expert_feed_forward_length": EXPERT,
            "expert_shared_count": 1,
            "expert_gating_func": SIGMOID,
            "expert_weights_norm": True,
            "nextn_predict_layers": 1,
        },
        extra={**SHARED, "exp_probs_b.bias": (EXPERTS,)},
        dense_layers=1,
        nextn_layers=1,
        norm="post_attention_norm",
    ),
    "gpt-oss": Layout(
        architecture="gpt-oss",
        attention=_with_sinks,
        keys={
            "expert_feed_forward_length": EXPERT,
            "attention.sliding_window": 128,
            "rope.freq_base": 10_000.0,
        },
        extra={
            "ffn_gate_inp.bias": (EXPERTS,),
            "ffn_gate_exps.bias": (EXPERTS, EXPERT),
            "ffn_up_exps.bias": (EXPERTS, EXPERT),
            "ffn_down_exps.bias": (EXPERTS, WIDTH),
        },
        norm="post_attention_norm",
    ),
}


def moe_gguf(
    path: Path,
    layout: str,
    *,
    layers: int = 3,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    down: gguf.GGMLQuantizationType | None = None,
    width: int = 0,
    keys: Mapping[str, Any] | None = None,
    split_tensors: int = 0,
) -> Path:
    """Write a model of one of the `LAYOUTS`, with 16 experts of which 4 are used.

    Args:
        path: The file. With `split_tensors` its stem names the parts.
        layout: Name of the layout.
        layers: Blocks in all.
        kind: The type of the experts; other tensors are 32 bit floats.
        down: The type of their last matrices, where it is another.
        width: Of the inner layers of experts; 0 for the layout's own.
        keys: Metadata that adds to or replaces the usual; None as a value removes a key.
        split_tensors: Tensors per part; 0 writes one file.

    Returns:
        The file, or the first part.
    """
    one = LAYOUTS[layout]
    if width:
        one = _with_width(one, width)
    writer = gguf.GGUFWriter(path, one.architecture, split_max_tensors=split_tensors)
    usual: dict[str, Any] = {
        "block_count": layers,
        "context_length": 512,
        "embedding_length": WIDTH,
        "feed_forward_length": DENSE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": HEAD,
        "vocab_size": VOCABULARY,
        "expert_count": EXPERTS,
        "expert_used_count": USED,
    }
    for key, value in {**usual, **one.keys, **(keys or {})}.items():
        _add(writer, f"{one.architecture}.{key}", value)
    writer.add_name(layout)
    add_vocabulary(writer, VOCABULARY)
    writer.add_chat_template(CHATML)
    rng = np.random.default_rng(1)
    for name, shape in _tensors(one, layers):
        values = _values(rng, name, shape)
        wanted = (down if "down_exps" in name else None) or kind
        if "_exps.weight" in name and wanted != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, _quantised(rng, values, wanted), raw_dtype=wanted)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def _with_width(one: Layout, width: int) -> Layout:
    key = "expert_feed_forward_length"
    keys = {**one.keys, key if key in one.keys else "feed_forward_length": width}
    biases = [f"ffn_{part}_exps.bias" for part in ("gate", "up")]
    extra = {**one.extra, **{name: (EXPERTS, width) for name in biases if name in one.extra}}
    return replace(one, keys=keys, extra=extra, expert_width=width)


def _quantised(rng: np.random.Generator, values: Array, kind: gguf.GGMLQuantizationType) -> Array:
    if kind != gguf.GGMLQuantizationType.Q4_K:
        return gguf.quants.quantize(values, kind)
    # gguf reads this type and cannot make it: random bytes, with two scales before each block.
    block, size = gguf.GGML_QUANT_SIZES[kind]
    shape = (*values.shape[:-1], values.shape[-1] // block, size)
    blocks = rng.integers(0, 256, shape, np.uint8)
    blocks[..., :4] = np.array([1e-4, 1e-4], np.float16).view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            return
        case bool():
            writer.add_bool(key, value)
        case float():
            writer.add_float32(key, value)
        case int():
            writer.add_uint32(key, value)
        case _:
            writer.add_array(key, value)


def _values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float32)
    values = rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)
    if name == "output.weight":  # so that an answer is printable and never ends by itself
        values[[i for i in range(shape[0]) if not 3 + 0x21 <= i < 3 + 0x7F]] = 0
    return values


def _tensors(one: Layout, layers: int) -> Tensors:
    yield "token_embd.weight", (VOCABULARY, WIDTH)
    yield "output_norm.weight", (WIDTH,)
    yield "output.weight", (VOCABULARY, WIDTH)
    for layer in range(layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", (WIDTH,)
        for name, shape in one.attention():
            yield block + name, shape
        yield f"{block}{one.norm}.weight", (WIDTH,)
        if layer < one.dense_layers:
            yield block + "ffn_gate.weight", (DENSE, WIDTH)
            yield block + "ffn_up.weight", (DENSE, WIDTH)
            yield block + "ffn_down.weight", (WIDTH, DENSE)
            continue
        yield block + "ffn_gate_inp.weight", (EXPERTS, WIDTH)
        yield block + "ffn_gate_exps.weight", (EXPERTS, one.expert_width, WIDTH)
        yield block + "ffn_up_exps.weight", (EXPERTS, one.expert_width, WIDTH)
        yield block + "ffn_down_exps.weight", (EXPERTS, WIDTH, one.expert_width)
        for name, shape in one.extra.items():
            yield block + name, shape
        if layer >= layers - one.nextn_layers:
            yield block + "nextn.eh_proj.weight", (WIDTH, 2 * WIDTH)
            yield block + "nextn.enorm.weight", (WIDTH,)
            yield block + "nextn.hnorm.weight", (WIDTH,)
