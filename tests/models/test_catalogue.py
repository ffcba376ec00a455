"""Names of models: who is called what, and what a name means."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmesh.errors import ModelError
from p2pmesh.models.cards import ModelDigest
from p2pmesh.models.catalogue import (
    AUTO,
    AmbiguousModel,
    Catalogue,
    Named,
    UnknownModel,
    public_id,
    split_part,
)
from tests.models.builders import DEADLINE_MS

A = ModelDigest("a" * 64)
B = ModelDigest("b" * 64)
C = ModelDigest("c" * 64)


@pytest.mark.parametrize(
    ("file_name", "expected"),
    [
        ("qwen3-8b-q4_k_m.gguf", "qwen3-8b-q4_k_m"),
        ("Big.Model-Q8_0-00001-of-00003.gguf", "Big.Model-Q8_0"),
        ("Big-00003-of-00003.GGUF", "Big"),
        ("no-suffix", "no-suffix"),
        ("v1.5.gguf", "v1.5"),
        ("twice.gguf.gguf", "twice.gguf"),
        ("-00001-of-00002.gguf", "-00001-of-00002"),
        ("x-1-of-3.gguf", "x-1-of-3"),
        (".gguf", "model"),
        ("bad\x1bname\udcff.gguf", "bad name"),
        ("ä b.gguf", "ä b"),
    ],
)
def test_public_ids(file_name: str, expected: str) -> None:
    assert public_id(file_name) == expected


def test_parts_are_numbered() -> None:
    assert split_part("m-00002-of-00010") == ("m", 2, 10)
    assert split_part("m") == ("m", 1, 1)


def test_one_model_answers_to_all_its_names() -> None:
    catalogue = Catalogue([Named(digest=A, stem="qwen", name="Qwen 3"), Named(digest=B, stem="x")])
    assert catalogue.id_of(A) == "qwen"
    for text in ("qwen", "Qwen 3", A, A[:8], A[:20].upper(), f"qwen@{A[:8]}", f"qwen@{A}"):
        assert catalogue.resolve(text) == A


@pytest.mark.parametrize("text", ["", "qwe", "QWEN", A[:7], "qwen@bbbbbbbb", "qwen@", A + "a"])
def test_a_name_is_never_guessed(text: str) -> None:
    catalogue = Catalogue([Named(digest=A, stem="qwen", name="Qwen 3")])
    with pytest.raises(UnknownModel):
        catalogue.resolve(text)


def test_unknown_digests_have_no_id() -> None:
    with pytest.raises(UnknownModel, match=B):
        Catalogue([]).id_of(B)


def test_two_models_with_one_stem_are_told_apart() -> None:
    catalogue = Catalogue([Named(digest=B, stem="m"), Named(digest=A, stem="m")])
    assert catalogue.id_of(A) == "m@aaaaaaaa"
    assert catalogue.resolve("m@bbbbbbbb") == B
    with pytest.raises(AmbiguousModel, match="choose one of: m@aaaaaaaa, m@bbbbbbbb") as caught:
        catalogue.resolve("m")
    assert caught.value.choices == ("m@aaaaaaaa", "m@bbbbbbbb")
    assert isinstance(caught.value, ModelError)


def test_shared_names_and_prefixes_are_ambiguous_too() -> None:
    near = ModelDigest("a" * 63 + "b")
    catalogue = Catalogue(
        [Named(digest=A, stem="x", name="N"), Named(digest=near, stem="y", name="N")]
    )
    for text in ("N", "a" * 8, "a" * 63):
        with pytest.raises(AmbiguousModel) as caught:
            catalogue.resolve(text)
        assert caught.value.choices == ("x", "y")
    assert catalogue.resolve(near) == near


def test_an_id_is_stronger_than_somebody_elses_alias() -> None:
    catalogue = Catalogue([Named(digest=A, stem="x", name="y"), Named(digest=B, stem="y")])
    assert catalogue.resolve("y") == B


def test_a_file_renamed_on_one_node_keeps_both_names() -> None:
    catalogue = Catalogue(
        [Named(digest=A, stem="z"), Named(digest=A, stem="a"), Named(digest=A, stem="z")]
    )
    assert catalogue.id_of(A) == "a"
    assert catalogue.resolve("z") == A


def test_no_file_name_takes_another_models_id() -> None:
    catalogue = Catalogue(
        [Named(digest=A, stem="m"), Named(digest=B, stem="m"), Named(digest=C, stem="m@aaaaaaaa")]
    )
    assert catalogue.resolve("m@aaaaaaaa") == A
    assert catalogue.id_of(C) == "m@aaaaaaaa@cccccccc"
    assert catalogue.resolve(catalogue.id_of(C)) == C


def test_a_model_with_the_stronger_claim_keeps_its_name() -> None:
    catalogue = Catalogue(
        [
            Named(digest=A, stem="m", name="M", claim=2),
            Named(digest=B, stem="m", name="M"),
            Named(digest=A, stem="a", name="Other"),
        ]
    )
    assert catalogue.id_of(A) == "m", "not what somebody without a claim calls it"
    assert catalogue.id_of(B) == "m@bbbbbbbb"
    assert catalogue.resolve("m") == catalogue.resolve("M") == catalogue.resolve("a") == A


def test_no_model_is_called_what_means_any() -> None:
    catalogue = Catalogue([Named(digest=A, stem=AUTO, claim=2)])
    assert catalogue.id_of(A) == "auto@aaaaaaaa"


def test_digests_forged_to_share_eight_characters_get_longer_ids() -> None:
    near = ModelDigest("a" * 9 + "b" * 55)
    catalogue = Catalogue([Named(digest=A, stem="m"), Named(digest=near, stem="m")])
    assert catalogue.id_of(A) == "m@aaaaaaaaaa"
    assert catalogue.id_of(near) == "m@aaaaaaaaab"


digests = st.text("ab", min_size=64, max_size=64).map(ModelDigest) | st.sampled_from([A, B, C])
stems = st.sampled_from(["m", "n", "m@aaaaaaaa", "aaaaaaaa", "m@" + "a" * 64]) | st.text(max_size=3)
entries = st.lists(
    st.builds(Named, digest=digests, stem=stems, name=stems, claim=st.integers(0, 2)), max_size=8
)


@given(entries, st.randoms())
@settings(deadline=DEADLINE_MS)
def test_every_id_is_unique_resolves_and_depends_on_the_set_only(
    named: list[Named], rng: random.Random
) -> None:
    catalogue = Catalogue(named)
    ids = {digest: catalogue.id_of(digest) for digest in {entry.digest for entry in named}}
    assert len(set(ids.values())) == len(ids)
    for digest, public in ids.items():
        assert catalogue.resolve(public) == digest
    shuffled = named * 2
    rng.shuffle(shuffled)
    again = Catalogue(shuffled)
    assert {digest: again.id_of(digest) for digest in ids} == ids
    owners = {stem: {e.digest for e in named if e.stem == stem} for stem in (e.stem for e in named)}
    for stem, digests_of_stem in owners.items():
        if len(digests_of_stem) == 1 and stem not in ids.values():
            assert {catalogue.resolve(stem)} == digests_of_stem
