"""Which feature maps of an arbitrary network are its stages."""

from __future__ import annotations


def choose_stages(sizes: list[int]) -> tuple[list[str], list[int]]:
    """Which maps, given in forward order by size, become "stem" and "stage1".."stage4": the last map of each size.

    With one size only (ViT), four or fewer evenly spaced maps. More than five sizes: the earliest are left out.
    """
    last_of_size = [i for i, size in enumerate(sizes) if i + 1 == len(sizes) or sizes[i + 1] != size]
    if len(last_of_size) == 1:
        count = min(4, len(sizes))
        last_of_size = [(part + 1) * len(sizes) // count - 1 for part in range(count)]
    stages = last_of_size[-4:]
    names = [f"stage{number}" for number in range(1, len(stages) + 1)]
    if len(last_of_size) > 4:
        return ["stem", *names], [last_of_size[-5], *stages]
    return names, stages
