"""Numbers out of tensors, many at once: each the one that ``float`` gives."""

import pytest
import torch
from helpers import tiny

import fastrot
from fastrot.scalars import numbers


def test_numbers_come_in_their_order_whatever_their_dtypes():
    dtypes = (torch.bfloat16, torch.float64, torch.float16, torch.float32) * 3
    scalars = [torch.tensor(1 / (1 + i), dtype=dtype) for i, dtype in enumerate(dtypes)]
    scalars += [torch.tensor(value) for value in (float("inf"), float("-inf"), -0.0)]
    assert numbers(iter(scalars)) == [float(scalar) for scalar in scalars]
    assert numbers([]) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_device_is_not_waited_for_at_every_weight(dtype, monkeypatch):
    """The number of waits is the same however many layers there are."""
    waits = []
    for name in ("__float__", "__bool__", "__int__", "item", "cpu", "tolist"):
        method = getattr(torch.Tensor, name)

        def counted(tensor, *args, method=method, **kwargs):
            waits.append(1)
            return method(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    counts = []
    for layers in (1, 3):
        waits.clear()
        fastrot.apply(tiny("llama", layers=layers, dtype=dtype))
        counts.append(len(waits))
    assert counts[0] == counts[1] > 0
