"""Do two checkpoints compute the same logits? Of their first layers, without loading the others.

A rotation leaves the function of every layer as it was, seen from the stream. So a model that ends
after its first layers, and goes on with its last norm and its head, shows it too: that embedding,
layers, norm, head and online rotations fit together. The model is built without weights as its
configuration says, whole, and its lists of layers are cut then: what a layer takes from the
configuration by its number stays right.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrot.checkpoint.available import available
from fastrot.checkpoint.header import CheckpointError, Entry, read_entry
from fastrot.checkpoint.job import numbers_of
from fastrot.checkpoint.source import outline
from fastrot.checkpoint.target import readable
from fastrot.checkpoint.tasks import ties_of
from fastrot.checkpoint.trace import loaded, missing
from fastrot.errors import RotationError
from fastrot.integrations.guard import lift
from fastrot.integrations.loading import put_on
from fastrot.online import installed
from fastrot.record import online_sites
from fastrot.verification import allowed, check_vocabularies, logits, random_prompts

LAYERS = 2
"""How many layers are enough: the second reads what the first has written into the stream."""


class NotComparedError(RotationError):
    """A model whose first layers can't be run by themselves."""


@dataclass(frozen=True)
class FirstLayers:
    """How far two models agree that end after their first layers; true if that is enough.

    Attributes:
        layers: how many those are.
        error: see :func:`median_error`.
        tolerance: the greatest error that is allowed.
    """

    layers: int
    error: float
    tolerance: float

    def __bool__(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        count = f"{self.layers} layers" if self.layers > 1 else "layer"
        error, most = f"{self.error:.2e}", f"{self.tolerance:.2e}"
        return "\n".join(
            (
                f"logits             behind the first {count}, computed in float32",
                f"relative error     {error} in the median of positions, tolerance {most}",
                "verified: the same function" if self else "FAILED: not the same function",
            )
        )


@torch.no_grad()
def verify_first_layers(
    source: str | Path, target: str | Path, layers: int = LAYERS, *, seed: int = 0
) -> FirstLayers:
    """Compare the logits of two checkpoints, each cut behind its first layers, in float32.

    One after the other lies in memory: these layers, the embedding, the last norm and the head.

    Args:
        source: the original, also in fp8 or mxfp4.
        target: the rotated one.
        layers: how many of them; all if there are no more.
        seed: of the token ids.

    Raises:
        NotComparedError: the source can't be cut, can't run when it is cut, or is too large.
        RotationError: the target can't be read or run, or reads other tokens.
        OSError: a file can't be read.
    """
    if layers < 1:
        raise ValueError(f"layers={layers}: logits are those of one layer or more")
    original = _Cut(Path(source).resolve(), layers)
    layers = original.layers
    try:
        rotated = _Cut(Path(target).resolve(), layers)
    except NotComparedError as error:  # of the target alone, so it is no model like the source
        raise RotationError(f"{target}: {error}") from error
    check_vocabularies(original.model, rotated.model)
    original.check_memory()
    prompts = random_prompts(original.model, seed)
    model = original.filled()
    try:
        expected = logits(model, prompts)
    except Exception as error:  # what a forward does with a list of layers that is cut
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise NotComparedError(
            f"a {type(model).__name__} does not run on {layers} layers ({why})"
        ) from error
    tolerance = allowed(model, prompts, expected, rotated.eps, median_error)
    del original, model
    gc.collect()
    got = logits(rotated.filled(), prompts)
    return FirstLayers(layers, median_error(got, expected), tolerance)


def median_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of ``expected`` at each position; the median of all.

    A rounding may send a token to another expert, which is no error and large: few positions, and
    as many or as few as chance will have it. A rotation that is not undone is at all positions.
    """
    pairs = [(a.double(), b.double()) for a, b in zip(got, expected, strict=True)]
    errors = [_quotient((a - b).norm(dim=-1), b.norm(dim=-1)).flatten() for a, b in pairs]
    return float(torch.cat(errors).median())


def _quotient(difference: Tensor, norm: Tensor) -> Tensor:
    """Logits may be zero, as those of a word whose embedding is; then nothing is off by nothing."""
    return torch.where((difference == 0) & (norm == 0), 0.0, difference / norm)


class _Cut:
    """A checkpoint whose model ends after its first layers; nothing but headers is read yet.

    Attributes:
        model: on the meta device, with the recorded online rotations of these layers.
        layers: how many it has.
        eps: distance from 1 to the next number, in the coarsest dtype of the checkpoint.
    """

    def __init__(self, folder: Path, layers: int):
        from fastrot.integrations.transformers import old_names

        self.model = outline(folder).eval()
        self._entries, self._coded, _ = numbers_of(folder, self.model)
        sites = online_sites(self.model)
        self.layers = min(layers, _shorten(self.model, layers))
        kept = {name for name, _ in self.model.named_modules()}
        rotations = put_on(self.model, [site for site in sites if site.module in kept])
        lift(self.model)
        self._renamings = old_names(rotations)
        dtypes = {entry.dtype for entry in self._entries.values() if entry.dtype.is_floating_point}
        self.eps = max(torch.finfo(dtype).eps for dtype in dtypes)

    def check_memory(self) -> None:
        """Refuse what does not fit; noise and conversions take another weight or two."""
        sizes = [weight.numel() for weight in self.model.parameters()]
        needed, free = 4 * (sum(sizes) + 2 * max(sizes)), available()
        if free is not None and needed > free:
            raise NotComparedError(
                f"its first layers, embedding and head take {readable(needed)} in float32, and "
                f"{readable(free)} of memory are free"
            )

    def filled(self) -> Any:
        """The model with its weights, in float32.

        Raises:
            CheckpointError: the checkpoint lacks one.
        """
        model, ties = self.model, ties_of(self.model)
        weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        state: dict[str, Tensor] = {}
        for name, value in loaded(model, self._entries, self._numbers, self._renamings):
            value = value.float() if value.is_floating_point() else value
            state[name] = nn.Parameter(value, requires_grad=False) if name in weights else value
        for name in model.state_dict().keys() - state.keys():
            other = next((other for other in ties.get(name, ()) if other in state), None)
            if other is not None:
                state[name] = state[other]
        lost = missing(model, state)
        if lost:
            raise CheckpointError(f"the checkpoint lacks {lost[0]}, which config.json describes")
        operands = {f"{name}.{r.name}.operand": r for name, _, r in installed(model)}
        for name in operands.keys() & state.keys():
            # Loading refuses what is damaged; what it computes is to be compared.
            operands[name].operand = state[name]
        others = {name: value for name, value in state.items() if name not in operands}
        model.load_state_dict(others, strict=False, assign=True)
        for tensor in state.values():
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        model._apply(_on_cpu)
        # What no checkpoint has, such as the frequencies of positions.
        model.initialize_weights()
        return model

    def _numbers(self, entry: Entry) -> Tensor:
        coded = self._coded.get(entry.name)
        if coded is None:
            return read_entry(entry)
        numbers = torch.empty(entry.shape)
        coded.decode(read_entry(coded.codes), numbers, 0)
        return numbers


def _shorten(model: Any, layers: int) -> int:
    """Cut the lists of layers of a decoder, and take away what sees and hears.

    Returns:
        How many layers there were.
    """
    from transformers import PreTrainedModel

    text = model.config.get_text_config()
    count, kinds = text.num_hidden_layers, (text.model_type, model.config.model_type)
    lists = [
        (part, name, child)
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and part.config.model_type in kinds
        for name, child in part.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if model.config.is_encoder_decoder:
        raise NotComparedError(f"a {type(model).__name__} is an encoder with a decoder")
    if not lists:
        raise NotComparedError(f"a {type(model).__name__} has no list of {count} decoder layers")
    for part, name, child in lists:
        setattr(part, name, child[:layers])
    _blind(model, [part for part, _, _ in lists])
    return int(count)


def _blind(module: nn.Module, decoders: list[nn.Module]) -> None:
    """Leave out the models beside the decoders: text does not pass through them."""
    from transformers import PreTrainedModel

    for name, child in module.named_children():
        if any(decoder in child.modules() for decoder in decoders):
            if child not in decoders:
                _blind(child, decoders)
        elif module not in decoders and isinstance(child, PreTrainedModel):
            setattr(module, name, nn.Identity())


def _on_cpu(tensor: Tensor) -> Tensor:
    if not tensor.is_meta:
        return tensor
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty_like(tensor, dtype=dtype, device="cpu")
