"""Model types that no row can describe, and why not: for each rotation, in the algebra's terms.

Where only some of the rotations are impossible a row of the tables says so in its ``refuses``.
"""

from collections.abc import Mapping as MappingABC

from fastrot.mapping.roles import ROTATIONS

Reasons = MappingABC[str, str]
"""Rotation → why it can't be done, for all of them."""


def _all(reason: str) -> Reasons:
    return dict.fromkeys(ROTATIONS, reason)


ENCODER = _all("it is an encoder that transformers can also let decode; fastrot rotates decoders")

DECODER_HALF = _all(
    "it is the decoder of an encoder-decoder and attends to the states of its encoder too; fastrot "
    "rotates decoders that stand alone"
)

ENCODER_DECODER = _all("it is an encoder-decoder; fastrot rotates decoders")

ASSISTANT = {
    "R1": "it reads the states of the model that it drafts for, whose stream would turn too",
    "R2": "it attends to the values of the model that it drafts for",
    "R3": "it attends to the keys of the model that it drafts for",
    "R4": "it does not stand alone, and fastrot rotates decoders that do",
}

CAPTION = _all(
    "its text model has the layers of an encoder, BERT's, and sees the image in them; fastrot "
    "rotates decoders"
)

REFUSED: dict[str, Reasons] = {
    **dict.fromkeys(
        (
            *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra"),
            *("ernie", "megatron-bert", "reformer", "rembert", "roberta", "roberta-prelayernorm"),
            *("roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod"),
        ),
        ENCODER,
    ),
    **dict.fromkeys(
        (
            *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart"),
            *("musicgen", "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "trocr"),
            "whisper",
        ),
        DECODER_HALF,
    ),
    **dict.fromkeys(("vision-encoder-decoder", "diffusion_gemma"), ENCODER_DECODER),
    **dict.fromkeys(("blip", "git"), CAPTION),
    "shieldgemma2": _all("it sorts images and has no head for text; rotate its Gemma 3 instead"),
    "pi0": _all(
        "it answers with motions and has no head for text; fastrot rotates decoders of text"
    ),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), ASSISTANT),
}
"""``model_type`` → the reasons for which none of the rotations can be done."""


def reasons_of(model_type: str) -> list[tuple[str, str]]:
    """The reasons of a refused type, rotations of the same reason together: ``("R1, R3", why)``."""
    reasons = REFUSED[model_type]
    return [
        (", ".join(name for name in reasons if reasons[name] == why), why)
        for why in dict.fromkeys(reasons.values())
    ]
