"""The tables as Markdown: ``docs/architectures.md`` and the summary in the README."""

from collections.abc import Iterator

from fastrot.mapping.refused import REFUSED, reasons_of
from fastrot.mapping.roles import PLACES, ROTATIONS, STREAM, Architecture
from fastrot.mapping.tables import ARCHITECTURES, SHELLS

OTHERWISE = " (otherwise)"

BEST_KNOWN = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "gemma2",
    "phi3",
    "gpt_oss",
    "olmo2",
    "gpt2",
    "deepseek_v3",
    "glm_moe_dsa",
    "falcon",
    "gptj",
    "mpt",
    "gemma4_text",
    "gemma3n_text",
    "minimax",
    "kimi_linear",
    "mamba",
    "mamba2",
    "llama4",
    "qwen3_vl",
    "gemma3",
    "mistral3",
    "llava",
)
"""Model types that the README names, in its order; of others it gives the number."""

HEAD = """\
# Architectures

Written by `fastrot architectures` from the tables in `fastrot/mapping/`; the tests check that it is
current. Model types are those of transformers. A model that is not listed, or whose settings do not
fit, is refused before anything is written; `fastrot.suggest_mapping(model)` proposes a row for it.

✓ fused into the weights (R1, R2) or online (R3, R4) as usual. ✓ₒ online where it is usually fused:
R1 then rotates the output of the norms that write into the residual stream, R2 the input of the
output projection. ✓ₗ fused where it is usually online: R3 then rotates the latent that is cached
(`docs/latent-attention.md`). – is refused, for the reason that follows.

## Language models

"""

SHELL_HEAD = """
## Around a language model

A multimodal model takes its rotations from the row of its language model; what else writes into the
residual stream is rotated with R1.

| model type | further writers | special |
|---|---|---|
"""

REFUSED_HEAD = """
## Refused

Decoders that transformers lists and that no row can describe, with the reason. Encoder-decoders
are refused as such, whatever they are called.

| model types | reason |
|---|---|
"""


def architectures_document() -> str:
    """``docs/architectures.md``."""
    shells = "".join(
        f"| {name} | {', '.join(map(_code, shell.writers + shell.post_norm)) or '–'} "
        f"| {shell.notes} |\n"
        for name, shell in sorted(SHELLS.items())
    )
    return f"{HEAD}{architectures_table()}{SHELL_HEAD}{shells}{REFUSED_HEAD}{_refused()}"


def _refused() -> str:
    """One line for each reason: the model types in one list."""
    alike: dict[str, list[str]] = {}
    for name in sorted(REFUSED):
        reasons = reasons_of(name)
        whole = [why if len(reasons) == 1 else f"{names}: {why}" for names, why in reasons]
        alike.setdefault("; ".join(whole), []).append(name)
    lines = sorted(f"| {', '.join(names)} | {reason} |\n" for reason, names in alike.items())
    return "".join(lines)


def architectures_table() -> str:
    """One line for each shape: model types, what each rotation does, what is special."""
    lines = ["| model types | R1 | R2 | R3 | R4 | special |", "|---|---|---|---|---|---|"]
    for names, row in sorted(_groups(), key=lambda pair: pair[0]):
        marks = " | ".join(_mark(row, rotation) for rotation in ROTATIONS)
        lines.append(f"| {', '.join(names)} | {marks} | {_special(row)} |")
    return "\n".join(lines) + "\n"


def support_summary() -> str:
    """For the README: which rotations, how many model types have them, and the best known ones.

    A model type with several rows counts for the most that one of them can do.
    """
    best: dict[str, str] = {}
    for names, row in _groups():
        marks = {rotation: _mark(row, rotation) for rotation in ROTATIONS}
        able = ", ".join(rotation for rotation, mark in marks.items() if mark != "–")
        for name in (name.removesuffix(OTHERWISE) for name in names):
            best[name] = max(best.get(name, ""), able, key=len)
    lines = ["| rotations | model types | among them |", "|---|---|---|"]
    for able in sorted(set(best.values()), key=lambda able: (-len(able), able)):
        lines.append(_counted(able, [name for name in best if best[name] == able]))
    lines.append(_counted("those of the language model inside", list(SHELLS)))
    return "\n".join(lines) + "\n"


def _counted(able: str, names: list[str]) -> str:
    return f"| {able} | {len(names)} | {', '.join(n for n in BEST_KNOWN if n in names)} |"


def _groups() -> Iterator[tuple[list[str], Architecture]]:
    """Rows of the same shape together."""
    rows: list[tuple[list[str], Architecture]] = []
    for name, found in sorted(ARCHITECTURES.items()):
        several = isinstance(found, tuple)
        for row in found if isinstance(found, tuple) else (found,):
            label = f"{name}{OTHERWISE}" if several and not row.when else name
            same = next((names for names, other in rows if other == row), None)
            if same is None:
                rows.append(([label], row))
            else:
                same.append(label)
    yield from rows


def _mark(row: Architecture, rotation: str) -> str:
    mapping = row.mapping
    if rotation in row.refuses or not getattr(mapping, PLACES[rotation]):
        return "–"
    unusual = {STREAM: bool(mapping.post_norm), "R2": mapping.attn_gated}
    if rotation == "R3" and mapping.latent_writers:
        return "✓ₗ"
    return "✓ₒ" if unusual.get(rotation) else "✓"


def _special(row: Architecture) -> str:
    mapping = row.mapping
    rows = {
        "all": "",
        "qkv": "one matrix [q, k, v]",
        "grouped": "one matrix, q, k and v of each head together",
        "latent": "latent attention",
    }
    kinds = {norm.kind for norm in row.norms}
    remarks = [
        " and ".join(f"{name} = {value}" for name, value in row.when.items()),
        rows[mapping.attn_v_rows],
        "LayerNorm, R1 fixes the ones vector" if "layer" in kinds else "",
        "norms 1 + γ" if any(norm.offset == 1 for norm in row.norms) else "",
        row.notes,
        *(f"{name}: {reason}" for name, reason in row.refuses.items()),
    ]
    return "; ".join(remark for remark in remarks if remark)


def _code(pattern: str) -> str:
    name = pattern.removeprefix("re:").replace("\\", "").removesuffix("$").removeprefix(".*")
    return f"`{name.removeprefix('.')}`"
