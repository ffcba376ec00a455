"""A model of any size that an engine loads and generates with: random weights, bytes as tokens.

What it says is gibberish, but printable. For measurements, where only sizes count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
HEAD_WIDTH = 64
PRINTABLE = range(0x21, 0x7F)

Matrix = npt.NDArray[np.float16] | npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes of a llama; about 2 bytes for each weight.

    Attributes:
        layers: Transformer blocks.
        width: Of the hidden state, a multiple of `HEAD_WIDTH`.
        feed_forward: Width of the inner layers.
        vocabulary: Tokens: the special ones, the bytes, and some that are never used.
        context: In tokens.
    """

    layers: int
    width: int
    feed_forward: int
    vocabulary: int
    context: int = 4096


def write_model(path: Path, sizes: Sizes) -> None:
    """Write a llama of 16 bit floats; equal sizes give equal files."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(sizes.layers)
    writer.add_context_length(sizes.context)
    writer.add_embedding_length(sizes.width)
    writer.add_feed_forward_length(sizes.feed_forward)
    writer.add_head_count(sizes.width // HEAD_WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_WIDTH)
    writer.add_vocab_size(sizes.vocabulary)
    _add_vocabulary(writer, sizes.vocabulary)
    writer.add_chat_template(CHATML)
    for name, values in _weights(sizes):
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, count: int) -> None:
    # GPT-2's stand-ins for the 256 bytes: printable letters, in the order of the bytes.
    letters = {*PRINTABLE, *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    tokens = [*SPECIAL, *(chr(byte if byte in letters else next(others)) for byte in range(256))]
    tokens += [f"<unused{number}>" for number in range(count - len(tokens))]
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL)
    kinds += [gguf.TokenType.NORMAL] * (count - len(SPECIAL))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["e t"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def _weights(sizes: Sizes) -> Iterator[tuple[str, Matrix]]:
    rng = np.random.default_rng(1)

    def random(rows: int, columns: int) -> npt.NDArray[np.float16]:
        values = rng.standard_normal((rows, columns), np.float32) / np.float32(columns**0.5)
        return values.astype(np.float16)

    width, inner = sizes.width, sizes.feed_forward
    norm = np.ones(width, np.float32)
    output = random(sizes.vocabulary, width)
    # The greatest of the printable ones' logits is above 0, those of all others are 0.
    first = len(SPECIAL) + PRINTABLE.start
    output[:first] = output[first + len(PRINTABLE) :] = 0
    yield "token_embd.weight", random(sizes.vocabulary, width)
    yield "output_norm.weight", norm
    yield "output.weight", output
    for layer in range(sizes.layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", norm
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"{block}{part}.weight", random(width, width)
        yield block + "ffn_norm.weight", norm
        yield block + "ffn_gate.weight", random(inner, width)
        yield block + "ffn_up.weight", random(inner, width)
        yield block + "ffn_down.weight", random(width, inner)
