"""The rotation of activations where nobody looks on but a compiler: in a server."""

import torch
from torch import Tensor

from fastrot.kernels.run import run, run_beside
from fastrot.online import OnlineRotation


class ServedRotation(OnlineRotation):
    """An online rotation without the questions that :func:`fastrot.hadamard_transform` asks.

    A server has no derivatives, modes and subclasses of tensors. A decode step finds the caches
    full of weights, so asking for them costs as much as a transform.
    """

    def heads(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate the heads of queries and keys together.

        Args:
            query: ``(tokens, heads * size)``.
            key: ``(tokens, kv_heads * size)``.

        Returns:
            New tensors of these shapes, which share memory as slices of a projection do.
        """
        widths = query.shape[1], key.shape[1]
        if self._plain(query):
            block = self.rotation.block
            both = run_beside(query, key, self.value, block**-0.5, block, self.inverse)
        else:
            joined = torch.cat((query, key), 1)
            both = self(joined.unflatten(1, (-1, self.rotation.size))).flatten(1)
        first, second = both.split_with_sizes(widths, 1)
        return first, second

    def _plain(self, x: Tensor) -> bool:
        """Whether the rotation is the transform of ``x`` in its own dtype, and nothing else."""
        return not (
            torch.compiler.is_dynamo_compiling()
            or type(x) is not Tensor
            or self.rotation.dense
            or self.rotation.fixes_ones
            or self.dtype == torch.float64
            or x.dtype == torch.float16
        )

    def _transformed(self, x: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling() or type(x) is not Tensor:
            return super()._transformed(x)
        block = self.rotation.block
        return run(x, self.value, block**-0.5, block, x.dim() - 1, self.inverse, "auto")
