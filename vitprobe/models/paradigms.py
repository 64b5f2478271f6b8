"""How models are trained, in the words of the paper's axis from masked image modeling to joint embeddings."""

from __future__ import annotations

from vitprobe.errors import UserError

PARADIGMS = {
    "MIM": "masked image modelling: predicts the patches that were hidden",
    "JEA": "joint-embedding architecture: agrees with another view of the image",
    "hybrid": "joint embedding and masked image modelling together",
    "supervised": "trained with class labels",
    "VLM": "trained with images and texts",
    "other": "trained in another way, by the word of whoever registered or loaded it",
    "random": "untrained weights",
    "unknown": "not in the registry",
}


def find_paradigm(word: str) -> str:
    """Return the key of `PARADIGMS` that a word means, in any case.

    Raises:
        UserError: for another word; lists the known ones.

    Example:
        >>> find_paradigm("mim")
        'MIM'
    """
    known = {name.casefold(): name for name in PARADIGMS}
    if not isinstance(word, str) or word.casefold() not in known:
        raise UserError(f"unknown paradigm {word!r}: use one of {', '.join(PARADIGMS)}")
    return known[word.casefold()]
