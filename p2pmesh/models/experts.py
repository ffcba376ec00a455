"""The experts of a model: which of its tensors hold them, and which experts a shard may keep.

Pure. A shard keeps some experts of each layer, with the rows of the router that choose them, and
everything else whole. Ids in different layers have nothing in common, so each layer has a list of
its own; llama.cpp knows one number of experts for all layers, so the lists are equally long.

Errors about a model are clauses that go on from its file's name, as in gguf.py; errors about
lists are sentences.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeAlias

from p2pmesh.errors import ConfigError, ModelError
from p2pmesh.models.cards import ModelDigest, card_of
from p2pmesh.models.gguf import Header
from p2pmesh.models.metadata import EXPERTS_MAX, Metadata
from p2pmesh.models.tensors import TensorInfo, layer_of
from p2pmesh.wire.codec import encode

ExpertLists: TypeAlias = Mapping[int, Sequence[int]]
"""The ids of the experts that each layer keeps, in the order that they have in the shard."""

KEPT_MIN = 2  # llama.cpp takes a model of one expert for a dense one, in some architectures
KEPT_PER_GROUP_MIN = 2  # llama.cpp scores a group by its two best experts
FEED_FORWARD_MAX = 2**24  # elements; the widest models have about 60,000
DIGEST_BYTES = 16

# The last axis of these counts experts.
_SLICED = re.compile(
    r"blk\.\d+\.(?:"
    r"ffn_(?:gate|up|down|gate_up)_exps\.(?:weight|bias|scale|input_scale)"
    r"|ffn_gate_inp\.(?:weight|bias)"
    r"|exp_probs_b(?:_vl)?(?:\.bias)?)"
)
# These are about experts too and have no such axis: shared experts, and the norm before all.
_WHOLE = re.compile(r"blk\.\d+\.(?:ffn_(?:gate|up|down|gate_inp)_shexp|ffn_norm_exps)\.\w+")
_EXPERTS = re.compile(r"blk\.\d+\.ffn_\w+_exps\.weight")

_REFUSED = {
    "deepseek4": "deepseek4 has tables from tokens to experts, which name experts by number",
    "grovemoe": "grovemoe has chunk experts, each of which belongs to a fixed group of experts",
}
_LLAMA4_NORMED = 128  # llama.cpp: with this count llama4 leaves out the norm of queries and keys


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayout:
    """The experts of a model.

    Attributes:
        count: Experts of each layer that has any; shared ones not among them.
        used: Of them, for each token, as the file has it: one number, or one for each layer.
        groups: Groups of equally many neighbouring experts; 1 where the model has none.
        groups_used: Groups of which experts are taken for one token.
        layers: Layers that have experts, ascending; those that predict further tokens (NextN) too.
        fixed_used: Whether the width of an expert follows from `used`, so that it must stay.
    """

    count: int
    used: int | tuple[int, ...]
    groups: int
    groups_used: int
    layers: tuple[int, ...]
    fixed_used: bool

    def used_of(self, kept: int) -> int | tuple[int, ...]:
        """Return what `used` becomes in a shard of `kept` experts per layer.

        Experts outside the chosen groups are never meant to be taken, and llama.cpp takes them
        without a word when the chosen groups hold too few.
        """
        limit = kept if self.groups == 1 else self.groups_used * (kept // self.groups)
        if isinstance(self.used, tuple):
            return tuple(min(one, limit) for one in self.used)
        return min(self.used, limit)


def is_sliced(name: str) -> bool:
    """Whether the last axis of a tensor counts experts, so that a shard has a part of it.

    Raises:
        ModelError: The tensor is about experts in a way that is not known here.
    """
    if _SLICED.fullmatch(name):
        return True
    if "exp" in name and not _WHOLE.fullmatch(name):
        raise ModelError(f"what its tensor {name!r} has to do with experts is not known")
    return False


def layout_of(headers: Sequence[Header]) -> ExpertLayout:
    """Return the experts of a model.

    Args:
        headers: Of its parts, in order; the first holds the metadata.

    Raises:
        ModelError: It has no experts, or no shard of it would be right.
    """
    card = card_of(headers)  # refuses what is no model, and parts that do not belong together
    facts = Metadata(headers[0])
    tensors = [tensor for header in headers for tensor in header.tensors]
    count = facts.number("expert_count", EXPERTS_MAX, default=0)
    _refuse(facts.architecture, count)
    layers = _layers(tensors, count)
    used = _used(headers[0], facts)
    if not 0 < card.experts_used <= count:
        raise ModelError(f"it uses {card.experts_used} of {count} experts; it is damaged or forged")
    groups = max(facts.number("expert_group_count", EXPERTS_MAX, default=0), 1)
    groups_used = facts.number("expert_group_used_count", EXPERTS_MAX, default=1)
    if groups > 1 and (count % groups or not 0 < groups_used < groups):
        raise ModelError(
            f"it has {count} experts in {groups} groups and uses {groups_used} of them; "
            "it is damaged or forged"
        )
    return ExpertLayout(
        count=count,
        used=used,
        groups=groups,
        groups_used=groups_used,
        layers=layers,
        fixed_used=_is_used_fixed(facts, tensors, card.layers, card.experts_used),
    )


def _refuse(architecture: str, count: int) -> None:
    if architecture in _REFUSED:
        raise ModelError(_REFUSED[architecture])
    if architecture == "llama4" and count == _LLAMA4_NORMED:
        raise ModelError(f"llama4 of {count} experts is another architecture with any other count")


def _layers(tensors: Iterable[TensorInfo], count: int) -> tuple[int, ...]:
    """The layers with experts; each tensor is checked to have the axis that would be cut."""
    experts: set[int] = set()
    routed: set[int] = set()
    for tensor in tensors:
        layer = layer_of(tensor.name)
        if not is_sliced(tensor.name) or layer is None:
            continue
        if count == 0 or not tensor.shape or tensor.shape[-1] != count:
            raise ModelError(
                f"its tensor {tensor.name!r} of shape {list(tensor.shape)} is not made of "
                f"{count} experts; it is damaged or forged"
            )
        if _EXPERTS.fullmatch(tensor.name):
            experts.add(layer)
        elif tensor.name.endswith(".ffn_gate_inp.weight"):
            routed.add(layer)
    if count == 0:
        raise ModelError("it has no experts; only mixture-of-experts models have shards")
    if not experts:
        raise ModelError(f"its {count} experts are stored in a way that is not known here")
    if experts != routed:
        layer = min(experts ^ routed)
        raise ModelError(f"its layer {layer} has experts without a router, or a router for none")
    return tuple(sorted(experts))


def _used(header: Header, facts: Metadata) -> int | tuple[int, ...]:
    value = header.metadata.get(f"{facts.architecture}.expert_used_count")
    if isinstance(value, tuple):  # which may have entries beyond the layers
        return tuple(facts.per_layer("expert_used_count", EXPERTS_MAX, len(value), default=0))
    return facts.number("expert_used_count", EXPERTS_MAX, default=0)


def _is_used_fixed(
    facts: Metadata, tensors: Iterable[TensorInfo], layers: int, used_max: int
) -> bool:
    """Whether llama.cpp computes the width of an expert: that of a dense layer by experts used."""
    if used_max == 1 or facts.has(f"{facts.architecture}.expert_feed_forward_length"):
        return False
    dense = facts.per_layer("feed_forward_length", FEED_FORWARD_MAX, layers, default=0)
    return any(
        tensor.name.endswith(".ffn_down_exps.weight")
        and tensor.shape[0] == dense[layer_of(tensor.name) or 0] // used_max
        for tensor in tensors
    )


def check_lists(layout: ExpertLayout, lists: ExpertLists) -> int:
    """Return how many experts each layer of a shard keeps, once the lists are known to be good.

    Raises:
        ConfigError: No shard can be made of these lists.
    """
    if set(lists) != set(layout.layers):
        missing, unknown = set(layout.layers) - set(lists), set(lists) - set(layout.layers)
        what = (
            f"No list for layer {min(missing)}" if missing else f"A list for layer {min(unknown)}"
        )
        raise ConfigError(f"{what}; the layers with experts are {ranges_text(layout.layers)}")
    first = layout.layers[0]
    kept = len(lists[first])
    for layer, experts in lists.items():
        if len(experts) != kept:
            raise ConfigError(
                f"Layer {first} would keep {kept} experts and layer {layer} {len(experts)}; "
                "keep equally many in each layer"
            )
        _check_list(layout, layer, experts)
    _check_kept(layout, kept)
    if layout.groups > 1:
        for layer, experts in lists.items():
            _check_groups(layout, layer, experts)
    return kept


def _check_list(layout: ExpertLayout, layer: int, experts: Sequence[int]) -> None:
    for expert in experts:
        if not 0 <= expert < layout.count:
            raise ConfigError(
                f"There is no expert {expert} in layer {layer}: they are 0 to {layout.count - 1}"
            )
    if len(set(experts)) != len(experts):
        twice = min(expert for expert in experts if experts.count(expert) > 1)
        raise ConfigError(f"Expert {twice} of layer {layer} is named twice; name it once")


def _check_kept(layout: ExpertLayout, kept: int) -> None:
    if kept < KEPT_MIN:
        raise ConfigError(f"A shard keeps at least {KEPT_MIN} experts of each layer, not {kept}")
    groups = layout.groups
    if groups > 1 and (kept % groups or kept < groups * KEPT_PER_GROUP_MIN):
        raise ConfigError(
            f"The experts are in {groups} groups; keep equally many of each, at least "
            f"{KEPT_PER_GROUP_MIN}: {KEPT_PER_GROUP_MIN * groups}, "
            f"{(KEPT_PER_GROUP_MIN + 1) * groups}, ... but not {kept}"
        )
    if layout.fixed_used and layout.used_of(kept) != layout.used:
        used = max(layout.used) if isinstance(layout.used, tuple) else layout.used
        raise ConfigError(
            f"Each token of this model needs {used} experts, because their width follows from "
            f"that number; keep more than {kept}"
        )


def _check_groups(layout: ExpertLayout, layer: int, experts: Sequence[int]) -> None:
    """Each group of the shard is one group of the model: the router chooses groups first."""
    before, after = layout.count // layout.groups, len(experts) // layout.groups
    found = [
        {expert // before for expert in experts[start : start + after]}
        for start in range(0, len(experts), after)
    ]
    if any(len(group) > 1 for group in found) or len(set().union(*found)) != layout.groups:
        raise ConfigError(
            f"Layer {layer} has {layout.groups} groups of {before} experts; name equally many of "
            "each group, those of one group one after the other"
        )


def first_experts(layout: ExpertLayout, count: int) -> ExpertLists:
    """Return lists of the first `count` experts of each layer; with groups, of each group's share.

    Raises:
        ConfigError: No shard has so many experts.
    """
    if count > layout.count:
        raise ConfigError(f"Each layer has {layout.count} experts; {count} cannot be kept")
    _check_kept(layout, count)
    size, share = layout.count // layout.groups, count // layout.groups
    return same_experts(
        layout, [group * size + at for group in range(layout.groups) for at in range(share)]
    )


def same_experts(layout: ExpertLayout, experts: Sequence[int]) -> ExpertLists:
    """Return lists that keep these ids in each layer."""
    return dict.fromkeys(layout.layers, tuple(experts))


def shard_digest(model: ModelDigest, ranking: str, lists: ExpertLists) -> str:
    """Return the key of a shard in a cache: 32 hexadecimal characters.

    Args:
        model: What it is cut from.
        ranking: The digest of the ranking that chose the experts; "" for none.
        lists: The experts in their order, which is part of the key: it is the order in the file.
    """
    rows = [[layer, list(lists[layer])] for layer in sorted(lists)]
    return blake2b(encode([model, ranking, rows]), digest_size=DIGEST_BYTES).hexdigest()


def shard_file_name(digest: str) -> str:
    """Return the name of the file in which a cache keeps the shard of this digest."""
    return f"shard-{digest}.gguf"


def ranges_text(numbers: Sequence[int]) -> str:
    """Ascending numbers, as people write them: (0, 1, 2, 5) -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)
