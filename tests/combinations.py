"""Which packages of `plugins/` there are, and in which combinations they are tested together.

Reads folders and nothing else, so that noxfile.py and the tests can both use it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

#: Up to so many plugins, every pair is tested; of more, as many pairs as so many plugins make.
PLUGINS_IN_PAIRS = 6
SEED = 20261121


def packages(root: Path) -> list[str]:
    """The names of the folders of `root/plugins` that are packages, sorted; none where there is no such folder."""
    return sorted(path.parent.name for path in (root / "plugins").glob("*/pyproject.toml"))


def combinations(plugins: Sequence[str], seed: int = SEED) -> dict[str, tuple[str, ...]]:
    """Name -> plugins that are installed together: "none", each by itself, pairs as "a+b", and "all".

    Where there are two plugins or fewer, "all" would be one of the others, and is left out.

    Args:
        plugins: names, in the order in which the combinations come.
        seed: of the sample of pairs, which is drawn for more than PLUGINS_IN_PAIRS plugins.
    """
    chosen: list[tuple[str, ...]] = [(), *((plugin,) for plugin in plugins), *pairs(plugins, seed)]
    named = {"+".join(names) or "none": names for names in chosen}
    if len(plugins) > 2:
        named["all"] = tuple(plugins)
    return named


def pairs(plugins: Sequence[str], seed: int = SEED) -> list[tuple[str, str]]:
    """Every pair, or of many plugins a sample in which each plugin has a part."""
    every = list(itertools.combinations(plugins, 2))
    if not is_sampled(plugins):
        return every
    chance = random.Random(seed)
    chance.shuffle(every)
    kept: list[tuple[str, str]] = []
    missing = set(plugins)
    for pair in every:  # first a part for each plugin, as two new ones at a time as the order gives
        if missing.intersection(pair):
            kept.append(pair)
            missing.difference_update(pair)
    size = max(PLUGINS_IN_PAIRS * (PLUGINS_IN_PAIRS - 1) // 2, len(kept))
    rest = [pair for pair in every if pair not in kept]
    return sorted(kept + rest[: size - len(kept)])


def is_sampled(plugins: Sequence[str]) -> bool:
    """Whether there are too many plugins to test every pair."""
    return len(plugins) > PLUGINS_IN_PAIRS
