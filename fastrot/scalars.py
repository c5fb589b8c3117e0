"""Single numbers out of tensors: a device is waited for once, not for each of them."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def numbers(scalars: Iterable[Tensor]) -> list[float]:
    """The numbers in tensors of no dimension, on any devices and of any floating dtypes."""
    given = list(scalars)
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for place, scalar in enumerate(given):
        alike[scalar.device, scalar.dtype].append(place)
    found = {
        place: number
        for places in alike.values()
        for place, number in zip(
            places, torch.stack([given[place] for place in places]).tolist(), strict=True
        )
    }
    return [found[place] for place in range(len(given))]
