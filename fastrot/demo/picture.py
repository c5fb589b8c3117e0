"""The picture in the README: what rotations do to outlier channels, as an SVG.

    python -m fastrot.demo.picture docs/outliers.svg

Every bar is a channel, its height the greatest magnitude over a text. The model is the demo's copy
with outliers, before and after R1 to R4. Plain Python writes the SVG, in colours that can be read
on white and on black.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

import fastrot
from fastrot.demo.evaluate import MODEL, OUTLIER_SCALE
from fastrot.demo.outliers import with_outliers
from fastrot.integrations.transformers import cache_argument

TEXT = '''
def read_table(path, separator=","):
    """Return the rows of a file as dictionaries."""
    with open(path, encoding="utf-8") as file:
        lines = [line.rstrip("\\n") for line in file]
    names = lines[0].split(separator)
    rows = []
    for line in lines[1:]:
        values = line.split(separator)
        if len(values) != len(names):
            raise ValueError(f"{line!r} has {len(values)} values")
        rows.append(dict(zip(names, values)))
    return rows
'''
"""Shorter than the 512 positions of the model; a fixed text gives a fixed picture."""

LAYER = 1
PANELS = {
    "q_proj": "R1: input of the q, k and v projections",
    "values": "R2: values in the cache",
    "keys": "R3: keys in the cache",
    "down_proj": "R4: input of the down projection",
}
WIDTH, HEIGHT, LEFT, TOP, GAP = 384, 84, 8, 68, 60
GREY, BEFORE, AFTER = "#7d8590", "#d4701c", "#3f87d6"


@torch.no_grad()
def magnitudes(model: Any) -> dict[str, Tensor]:
    """The greatest magnitude of each channel in a layer, by the names in :data:`PANELS`."""
    seen: dict[str, Tensor] = {}
    layer = model.model.layers[LAYER]
    modules = {"q_proj": layer.self_attn.q_proj, "down_proj": layer.mlp.down_proj}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, args, n=name: seen.update({n: args[0]}))
    cache = DynamicCache(config=model.config)
    model(torch.tensor([list(TEXT.encode())]), **cache_argument(model, cache), use_cache=True)
    for name in ("keys", "values"):
        heads = getattr(cache.layers[LAYER], name)
        seen[name] = heads.transpose(1, 2).flatten(2)
    return {name: seen[name].abs().amax((0, 1)) for name in PANELS}


def picture(folder: Path = MODEL) -> str:
    """The SVG: one row for each rotation, before it on the left and after it on the right."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = with_outliers(model, scale=OUTLIER_SCALE)
    rotated = with_outliers(model, scale=1)
    fastrot.apply(rotated, ("R1", "R2", "R3", "R4"))
    before, after = magnitudes(model), magnitudes(rotated)
    right = LEFT + WIDTH + 32
    parts = [
        _text(LEFT, 16, "before", BEFORE, bold=True),
        _text(right, 16, "after R1 + R2 + R3 + R4", AFTER, bold=True),
    ]
    for row, (name, title) in enumerate(PANELS.items()):
        top = TOP + row * (HEIGHT + GAP)
        most = max(float(before[name].max()), float(after[name].max()))
        for x, values, colour in ((LEFT, before[name], BEFORE), (right, after[name], AFTER)):
            parts += _panel(x, top, values / most, colour)
            peak = float(values.max() / values.median())
            parts.append(_text(x, top - 8, f"greatest channel {peak:.1f} x median", GREY))
        parts.append(
            _text(LEFT, top - 26, f"{title}, {len(before[name])} channels", GREY, bold=True)
        )
    size = f"{right + WIDTH + LEFT} {TOP + len(PANELS) * (HEIGHT + GAP) - GAP + 12}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img">'
    about = "<title>Greatest magnitude of every channel, before and after rotation</title>"
    return "\n".join([head, about, *parts, "</svg>"]) + "\n"


def _panel(x: float, top: float, heights: Tensor, colour: str) -> list[str]:
    """Bars as one path, their heights shares of the panel's, and the line they stand on."""
    step, bottom = WIDTH / len(heights), top + HEIGHT
    bars = "".join(
        f"M{x + step * (i + 0.5):.1f} {bottom}V{bottom - HEIGHT * height:.1f}"
        for i, height in enumerate(heights.tolist())
    )
    width = max(0.75 * step, 1)
    return [
        f'<path d="{bars}" stroke="{colour}" stroke-width="{width:.2f}" fill="none"/>',
        f'<path d="M{x} {bottom}H{x + WIDTH}" stroke="{GREY}" stroke-width="1" fill="none"/>',
    ]


def _text(x: float, y: float, words: str, colour: str, *, bold: bool = False) -> str:
    weight = "bold" if bold else "normal"
    return (
        f'<text x="{x}" y="{y}" fill="{colour}" font-weight="{weight}" '
        f'font-size="13" font-family="Helvetica, Arial, sans-serif">{words}</text>'
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(), encoding="utf-8")
