"""From what a user asks for (sizes, ratios, a budget) to the target's `ArchSpec`. Pure arithmetic.

Shape letters: H hidden, F ffn, N query heads, G query groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from nemo_minitron.arch import ArchSpec
from nemo_minitron.errors import ArchError, ConfigError

PRUNABLE_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")


def target_arch(source: ArchSpec, sizes: Mapping[str, int]) -> ArchSpec:
    """`source` with `sizes`; those that are not named stay.

    `num_query_groups` alone keeps the heads per group, so heads go with their groups; so does `num_attention_heads`
    alone where every head is a group of its own. `head_dim` never changes.

    Raises:
        ConfigError: an unknown size.
        ArchError: a size that is no positive integer or larger than the source's, heads that cannot be spread evenly
            over the groups, or more heads a group than the source has.
    """
    for key, size in sizes.items():
        if key not in PRUNABLE_SIZES:
            raise ConfigError("unknown size", expected="one of " + ", ".join(PRUNABLE_SIZES), found=repr(key),
                              key=f"prune.target.{key}")
        largest = getattr(source, key)
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= largest:
            raise ArchError("the target does not fit its source", key=f"prune.target.{key}", found=repr(size),
                            expected=f"{key} to be an integer from 1 to {largest} (the source's)")
    changes = dict(sizes)
    if "num_query_groups" in changes and "num_attention_heads" not in changes:
        changes["num_attention_heads"] = changes["num_query_groups"] * source.heads_per_group
    elif "num_attention_heads" in changes and source.heads_per_group == 1:
        changes.setdefault("num_query_groups", changes["num_attention_heads"])
    heads = changes.get("num_attention_heads", source.num_attention_heads)
    groups = changes.get("num_query_groups", source.num_query_groups)
    if heads % groups or heads // groups > source.heads_per_group:
        raise ArchError("heads are pruned alike in every KV group", key="prune.target.num_attention_heads",
                        expected=f"a multiple of {groups} groups with at most {source.heads_per_group} heads each",
                        found=f"{heads} heads")
    return dataclasses.replace(source, num_layers=changes.get("num_layers", source.num_layers),
                               hidden_size=changes.get("hidden_size", source.hidden_size),
                               ffn_hidden_size=changes.get("ffn_hidden_size", source.ffn_hidden_size),
                               num_attention_heads=heads, num_query_groups=groups).check()


def resolve_target(source: ArchSpec, *, sizes: Mapping[str, int], ratios: Mapping[str, float] | None = None,
                   budget: float | None = None, non_embedding: bool = False,
                   divisors: Mapping[str, int] | None = None,
                   dropped_layers: tuple[int, ...] | None = None) -> ArchSpec:
    """The target that sizes, ratios, a budget and a list of dropped layers ask for together.

    Args:
        source: shape of the model that is pruned.
        sizes: sizes by name.
        ratios: fractions in (0, 1] of the source's sizes, rounded to the nearest multiple of their divisor (at least
            one, never above the source's); 1 keeps the size.
        budget: most parameters that may stay; up to 1 it is a fraction of the source's. See `_fill_budget`.
        non_embedding: the budget counts without both embedding matrices.
        divisors: by size name; 1 where absent.
        dropped_layers: layers that go; their number decides num_layers.

    Raises:
        ConfigError: a size asked for twice, a ratio or budget that is none or cannot be met, bad layers.
        ArchError: as `target_arch`.
    """
    divisors = divisors or {}
    wanted = dict(sizes)
    for key, ratio in (ratios or {}).items():
        if key in wanted:
            raise ConfigError("a size is asked for twice", expected="a size or a ratio", found="both",
                              key=f"prune.target.{key} and prune.ratio.{key}")
        if not 0 < ratio <= 1:
            raise ConfigError("bad ratio", expected="above 0 and at most 1", found=str(ratio), key=f"prune.ratio.{key}")
        wanted[key] = _rounded(getattr(source, key), ratio, divisors.get(key, 1)) if key in PRUNABLE_SIZES else 0
    if dropped_layers is not None:
        check_dropped(source, dropped_layers)
        left = source.num_layers - len(dropped_layers)
        if wanted.setdefault("num_layers", left) != left:
            raise ConfigError("the list of layers does not fit the number of layers", key="prune.layers.drop",
                              expected=f"{source.num_layers - wanted['num_layers']} layers",
                              found=f"{len(dropped_layers)}")
    target = target_arch(source, wanted)
    return target if budget is None else _fill_budget(source, target, set(wanted), budget, non_embedding, divisors)


def check_dropped(source: ArchSpec, dropped: tuple[int, ...]) -> None:
    """Raise `ConfigError` for a list of layers that is empty, all of them, out of range or names one twice."""
    outside = [layer for layer in dropped if not 0 <= layer < source.num_layers]
    twice = sorted({layer for layer in dropped if dropped.count(layer) > 1})
    if outside or twice or not 0 < len(dropped) < source.num_layers:
        found = f"{outside} out of range" if outside else f"{twice} twice" if twice else f"{len(dropped)} layers"
        raise ConfigError("bad list of layers", key="prune.layers.drop", found=found,
                          expected=f"distinct layers from 0 to {source.num_layers - 1}, not all of them")


def _rounded(size: int, ratio: float, divisor: int) -> int:
    if ratio == 1:
        return size
    return min(size, max(divisor, divisor * round(size * ratio / divisor)))


def _fill_budget(source: ArchSpec, target: ArchSpec, fixed: set[str], budget: float, non_embedding: bool,
                 divisors: Mapping[str, int]) -> ArchSpec:
    """The default shape: layers and attention stay, hidden and FFN shrink in nearly the same proportion.

    The width-pruned models of arXiv:2408.11796 do so (4096 -> 3072 with 14336 -> 9216, 5120 -> 4096 with 14336 ->
    11520). For every hidden size on the grid of its divisor the largest FFN that meets the budget is taken; of these
    pairs the one whose two proportions differ least is the target (of equal ones the wider hidden size). Sizes in
    `fixed` stay as they are in `target`.
    """
    count = ArchSpec.num_non_embedding_parameters if non_embedding else ArchSpec.num_parameters
    if not budget > 0:
        raise ConfigError("bad budget", expected="a number of parameters or a fraction", found=str(budget),
                          key="prune.budget")
    limit = budget * count(source) if budget <= 1 else budget
    if limit > count(source):
        raise ConfigError("a budget above the source", expected=f"at most {count(source):,} parameters",
                          found=f"{limit:,.0f}", key="prune.budget")
    steps = {key: divisors.get(key, 1) for key in ("hidden_size", "ffn_hidden_size")}

    def sized(hidden: int, ffn: int) -> ArchSpec:
        return dataclasses.replace(target, hidden_size=hidden, ffn_hidden_size=ffn)

    def grid(key: str) -> list[int]:
        if key in fixed:
            return [getattr(target, key)]
        size, step = getattr(source, key), steps[key]
        return [size, *range((size - 1) // step * step, 0, -step)]

    hiddens, ffns = grid("hidden_size"), grid("ffn_hidden_size")
    fitting = []
    for hidden in hiddens:
        ffn = next((ffn for ffn in ffns if count(sized(hidden, ffn)) <= limit), None)
        if ffn is not None:
            difference = abs(hidden / source.hidden_size - ffn / source.ffn_hidden_size)
            fitting.append((difference, -hidden, sized(hidden, ffn)))
    if fitting:
        return min(fitting, key=lambda found: found[:2])[2].check()
    least = count(sized(hiddens[-1], ffns[-1]))
    raise ConfigError("the budget cannot be met", expected=f"at least {least:,} parameters with what else is fixed",
                      found=f"{limit:,.0f}", key="prune.budget")
