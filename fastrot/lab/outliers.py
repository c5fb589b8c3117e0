"""How uneven activations are, at every place where a scheme rounds them.

=========  ==============================
site       vectors
=========  ==============================
attention  input of q, k and v, per token
o          input of the output projection
mlp        input of gate and up
down       input of the down projection
keys       per token and head, after RoPE
values     per token and head
latents    per token, of latent attention
positions  its key that RoPE turns
=========  ==============================

Everything is measured after the online rotations, so on what would be rounded.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrot.index import Index, find_holders
from fastrot.lab.cache import watched
from fastrot.lab.quantized import decoder_layers, layer_of
from fastrot.lab.schemes import CACHED
from fastrot.rows import roles_of

ROLES = {"attention": "attn_q", "o": "attn_o", "mlp": "mlp_in", "down": "mlp_out"}
SITES = (*ROLES, *CACHED)
FUSED = ("qkv", "grouped")
"""Rows of a projection that makes queries and keys, too; its only role is that of the values."""
MASSIVE = 10
"""A token is massive if its rms is more than this times the median of all."""

See = Callable[[str, int, Tensor], None]


@dataclass(frozen=True)
class Outliers:
    """Of one site in one layer.

    Attributes:
        vectors: how many were seen.
        peak: median of the greatest magnitude over the rms of a vector.
        worst: the greatest of these.
        kurtosis: mean over vectors of the fourth moment over the square of the second; 3 is a
            normal distribution's.
        massive: vectors whose rms is more than ten times the median.
    """

    vectors: int
    peak: float
    worst: float
    kurtosis: float
    massive: int


class Histogram:
    """Counts of positive values in logarithmic bins, 0.2 % wide, so that memory is bounded."""

    LOWEST, HIGHEST, PER_OCTAVE = -64, 64, 350

    def __init__(self) -> None:
        self.counts = torch.zeros((self.HIGHEST - self.LOWEST) * self.PER_OCTAVE, dtype=torch.long)

    def add(self, values: Tensor) -> None:
        """Count values; what is beyond 2^±64 goes to the outermost bins."""
        self.counts += torch.bincount(self._bins(values), minlength=len(self.counts))

    def median(self) -> float:
        """The lower median, to the width of a bin."""
        place = torch.searchsorted(self.counts.cumsum(0), (self.counts.sum() + 1) // 2)
        return float(2.0 ** ((float(place) + 0.5) / self.PER_OCTAVE + self.LOWEST))

    def above(self, value: float) -> int:
        """How many are greater, to the width of a bin."""
        return int(self.counts[int(self._bins(torch.tensor([value]))) + 1 :].sum())

    def _bins(self, values: Tensor) -> Tensor:
        places = (values.double().log2() - self.LOWEST) * self.PER_OCTAVE
        return places.nan_to_num(0, posinf=1e9, neginf=0).long().clamp(0, len(self.counts) - 1)


class Collector:
    """What is known so far of one site in one layer."""

    def __init__(self) -> None:
        self.peaks, self.sizes = Histogram(), Histogram()
        self.worst = self.kurtosis = 0.0
        self.vectors = 0

    def add(self, x: Tensor) -> None:
        """Take in vectors ``(…, n)``; vectors of zeros say nothing, and are left out."""
        x = x.detach().flatten(0, -2).float()
        square = x.square()
        power = square.mean(-1)
        x, square, power = (t[power > 0] for t in (x, square, power))
        if not len(x):
            return
        size = power.sqrt()
        peaks = x.abs().amax(-1) / size
        self.peaks.add(peaks.cpu())
        self.sizes.add(size.cpu())
        self.worst = max(self.worst, float(peaks.max()))
        self.kurtosis += float(((square / power[:, None]).square().mean(-1)).double().sum())
        self.vectors += len(x)

    def result(self) -> Outliers:
        """The statistics."""
        return Outliers(
            self.vectors,
            self.peaks.median(),
            self.worst,
            self.kurtosis / max(self.vectors, 1),
            self.sizes.above(MASSIVE * self.sizes.median()),
        )


@torch.no_grad()
def outliers(
    model: Any, windows: Tensor, done: Callable[[int], Any] | None = None
) -> dict[str, dict[int, Outliers]]:
    """Statistics of every site, by layer; a site that no module of a model has is left out.

    Args:
        model: a causal language model of fastrot's tables.
        windows: token ids, ``(n, length)``.
        done: told how many tokens were seen after each window.

    Raises:
        UnknownArchitectureError: no table says where the sites are.
    """
    found: dict[tuple[str, int], Collector] = {}
    with observed(
        model, lambda site, layer, x: found.setdefault((site, layer), Collector()).add(x)
    ):
        for window in windows.split(1):
            model(input_ids=window.to(model.device))
            if done is not None:
                done(window.numel())
    return {
        site: {layer: found[site, layer].result() for s, layer in sorted(found) if s == site}
        for site in SITES
        if any(s == site for s, _ in found)
    }


@torch.no_grad()
def magnitudes(model: Any, window: Tensor, site: str, layer: int) -> Tensor:
    """The surface of one site, ``(length, channels)``: magnitudes of a text of token ids.

    What is cached shows its heads side by side.
    """
    seen: list[Tensor] = []

    def see(name: str, number: int, x: Tensor) -> None:
        if (name, number) == (site, layer):
            if site in CACHED:
                x = x.transpose(1, 2).flatten(2)
            seen.append(x.detach().abs().float().cpu().flatten(0, -2))

    with observed(model, see):
        model(input_ids=window[None].to(model.device))
    return seen[0]


@contextmanager
def observed(model: Any, see: See) -> Iterator[None]:
    """Show every site's vectors to a function, with the site and the number of the layer."""
    first, second = cached_sites(model)

    def see_cache(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        see(first, layer, keys)
        see(second, layer, values)
        return keys, values

    with ExitStack() as stack:
        stack.enter_context(watched(model, see_cache, needed=False))
        for (site, layer), module in modules_of(model).items():
            hook = _showing(site, layer, see)
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


def cached_sites(model: Any) -> tuple[str, str]:
    """What the cache of a model takes for keys and for values."""
    roles, _ = roles_of(Index(model), None, None, ())
    return ("latents", "positions") if roles.caches_latents else ("keys", "values")


def modules_of(model: Any) -> dict[tuple[str, int], nn.Module]:
    """The first module of every role in every layer, by site and number of the layer."""
    index = Index(model)
    roles, _ = roles_of(index, None, None, ())
    layers = decoder_layers(model)
    found: dict[tuple[str, int], nn.Module] = {}
    patterns = {site: getattr(roles, role) for site, role in ROLES.items()}
    if not patterns["attention"] and roles.attn_v_rows in FUSED:
        patterns["attention"] = roles.attn_v
    for site, targets in patterns.items():
        for name, holder in find_holders(index, targets, missing_ok=True).items():
            layer = layer_of(name, layers)
            if layer is not None and isinstance(holder, nn.Module):
                found.setdefault((site, layer), holder)
    return found


def _showing(site: str, layer: int, see: See) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda module, args: see(site, layer, args[0])
