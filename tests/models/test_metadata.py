"""Single facts of a header: defaults, per-layer lists, and values of the wrong kind."""

from __future__ import annotations

import pytest

from p2pmesh.errors import ModelError
from p2pmesh.models.gguf import Skipped, Value, ValueType
from p2pmesh.models.metadata import Metadata
from tests.models.builders import header_of


def facts(arch: str = "llama", **metadata: Value | None) -> Metadata:
    """Keys are the architecture's; two underscores stand for a dot."""
    keys = {f"{arch}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    return Metadata(header_of(keys, arch=arch))


def test_cache_defaults_are_llama_cpps() -> None:
    # 64 / 4 heads = 16 wide, as many heads for keys as for queries: 4 x (16 + 16) x 2 bytes.
    assert sum(facts().kv_layer_bytes(1)) == 256
    assert sum(facts(attention__head_count_kv=1).kv_layer_bytes(3)) == 192
    other = facts(attention__key_length=128, attention__value_length=64)
    assert sum(other.kv_layer_bytes(1)) == 4 * (128 + 64) * 2


def test_cache_follows_lists_per_layer() -> None:
    assert sum(facts(attention__head_count_kv=(4, 0, 2)).kv_layer_bytes(3)) == 6 * 32 * 2
    with pytest.raises(ModelError, match="2 entries for 3 layers"):
        facts(attention__head_count_kv=(4, 4)).kv_layer_bytes(3)


def test_hybrids_keep_a_cache_in_their_attention_layers_only() -> None:
    assert sum(facts(full_attention_interval=4).kv_layer_bytes(48)) == 12 * 256
    recurrent = (True, True, False)
    assert sum(facts(attention__recurrent_layers=recurrent).kv_layer_bytes(3)) == 256


def test_latent_attention_keeps_keys_only() -> None:
    mla = facts(
        "deepseek2",
        attention__head_count_kv=1,
        attention__key_length=576,
        attention__value_length=512,
        attention__key_length_mla=192,
    )
    assert sum(mla.kv_layer_bytes(27)) == 27 * 576 * 2


def test_recurrent_models_and_encoders_keep_none() -> None:
    assert sum(facts("mamba", attention__head_count=None).kv_layer_bytes(24)) == 0
    assert sum(facts("bert").kv_layer_bytes(12)) == 0


@pytest.mark.parametrize(
    ("arch", "pooling", "modality"),
    [
        ("llama", None, "completion"),
        ("llama", 0, "completion"),
        ("llama", 1, "embedding"),
        ("qwen3", 3, "embedding"),
        ("qwen3", 4, "rerank"),
        ("bert", None, "embedding"),
        ("nomic-bert", 0, "embedding"),
        ("bert", 4, "rerank"),
    ],
)
def test_modality(arch: str, pooling: int | None, modality: str) -> None:
    assert facts(arch, pooling_type=pooling).gives() == modality


def test_a_chat_template_makes_a_chat_model_but_not_of_an_embedder() -> None:
    template: dict[str, Value | None] = {"tokenizer.chat_template": "{{ messages }}"}
    assert Metadata(header_of(template)).gives() == "chat"
    long = {"tokenizer.chat_template": Skipped(type=ValueType.STRING, count=2**21)}
    assert Metadata(header_of(long)).gives() == "chat"
    assert Metadata(header_of({**template, "llama.pooling_type": 2})).gives() == "embedding"


def test_vocabulary_counts_the_tokens() -> None:
    tokens = Skipped(type=ValueType.STRING, count=151_936)
    assert Metadata(header_of({"tokenizer.ggml.tokens": tokens})).vocabulary() == 151_936
    assert Metadata(header_of({"tokenizer.ggml.tokens": ("a", "b")})).vocabulary() == 2
    assert facts(vocab_size=32_000).vocabulary() == 32_000
    assert facts().vocabulary() == 0


@pytest.mark.parametrize(
    ("file_type", "expected"),
    [(15, "Q4_K_M"), (0, "F32"), (32, "BF16"), (7, "Q8_0"), (1024, "Q8_0"), (None, "Q8_0")],
)
def test_quantisation_is_named_or_what_fills_most(file_type: int | None, expected: str) -> None:
    header = header_of({"general.file_type": file_type})
    assert Metadata(header).quantisation(header.tensors) == expected


@pytest.mark.parametrize("value", [-1, 0, 1001, True, 1.5, "6", (6,), 2**64])
def test_impossible_numbers_are_refused(value: Value) -> None:
    with pytest.raises(ModelError, match=r"llama\.block_count"):
        facts(block_count=value).number("block_count", 1000, least=1)


def test_a_missing_number_without_default_is_refused() -> None:
    with pytest.raises(ModelError, match=r"lacks llama\.block_count"):
        facts(block_count=None).number("block_count", 1000)


@pytest.mark.parametrize("value", ["", 7, "\x1b\n"])
def test_an_architecture_must_be_a_name(value: Value) -> None:
    with pytest.raises(ModelError, match="architecture"):
        Metadata(header_of({"general.architecture": value}))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("general.architecture", "clip", "vision or audio projector"),
        ("general.type", "mmproj", "vision or audio projector"),
        ("general.type", "adapter", "LoRA"),
        ("general.type", "imatrix", "importance matrix"),
    ],
)
def test_what_lies_beside_models_is_named(key: str, value: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        Metadata(header_of({key: value})).refuse_others()
