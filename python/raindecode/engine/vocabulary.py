"""Whether models that decode together mean the same by a token id.

Mixing adds their logits id by id, and every model is fed the ids that the first model's tokenizer made. So the tokenizers must
number the same tokens alike, and must split text alike, or a model reads what it was not trained on. Chat template and post-processor
(which puts a token such as <s> in front) may differ: they are applied once, by the first tokenizer; a difference is logged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from raindecode.errors import VocabularyError

_log = logging.getLogger("raindecode")
_SHOWN = 5  # differences listed in a message before "and n more"
_PADDING = 1024  # rows by which widths may differ without further question
_LARGEST_MULTIPLE = 1 << 14  # of the widths that padding makes

# Text that splits differently where pieces, spaces, digits, accents or bytes are treated differently.
_PROBES: Final = (
    "Human: Then there is the question of how other people in the town are to know about it. Assistant: Tell them.",
    "Hello, world!  Two spaces,\n\na new line\tand 12345.67 numbers.",
    "naïve café, Ünïcödé, 東京, 한국어, мир, 🙂",
    "def f(x):\n    return x**2  # don't",
    " a", "a ", "",
)  # fmt: skip


def check_same_tokenizer(reference: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, *, name: str) -> None:
    """Check that `other` numbers and splits text as `reference` does.

    Compared are: the text of every id, bos, pad where both have one (nothing is padded here), and of fast tokenizers the
    model with its merges, normalizer, pre-tokenizer, decoder and added tokens; of others the ids of a few texts.

    Args:
        name: what to call the model of `other` in messages.

    Raises:
        VocabularyError: the message says which check failed, and for which ids.
    """
    _check_texts(reference.get_vocab(), other.get_vocab(), name)
    _check_special(reference, other, name)
    ours, theirs = _backend(reference), _backend(other)
    if ours is None or theirs is None:
        _check_probes(reference, other, name)
    else:
        _check_backend(ours, theirs, name)
        if ours.get("post_processor") != theirs.get("post_processor"):
            _log.warning(
                "the tokenizer of %s frames a text otherwise (post-processor); the reference model's is used", name
            )
    if getattr(reference, "chat_template", None) != getattr(other, "chat_template", None):
        _log.warning("the chat template of %s differs; prompts are written in the reference model's", name)


def token_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids of a tokenizer: 0 to the result, exclusive. There may be gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def shared_vocab_size(tokenizer: PreTrainedTokenizerBase, widths: Sequence[int], names: Sequence[str]) -> int:
    """Ids that are tokens in every model: 0 to the result, exclusive.

    Rows of logits from there on are padding: they were never trained, and mixing with weights over 1 would amplify them.

    Args:
        tokenizer: the one all models share. Its ids may have gaps.
        widths: number of logits of every model.
        names: of the models, for messages.

    Raises:
        VocabularyError: a model has fewer logits than the tokenizer has ids, or the widths differ by more than padding explains.
    """
    size = token_count(tokenizer)
    rows = ", ".join(f"{name} {width}" for name, width in zip(names, widths, strict=True))
    if size < 1:
        raise VocabularyError("the tokenizer has no tokens; give a tokenizer that belongs to the models")
    if min(widths) < size:
        raise VocabularyError(
            f"the tokenizer has ids up to {size - 1}, but the models have these numbers of logits: {rows}; allowed: {size} or more "
            "each; give the models' own tokenizer, or resize the smaller model's embedding"
        )
    if max(widths) - min(widths) > _PADDING and not all(_is_padded(size, width) for width in widths):
        raise VocabularyError(
            f"the models have these numbers of logits: {rows}; the tokenizer has {size} ids; allowed: a difference of at most "
            f"{_PADDING}, or widths that are {size} rounded up for alignment; give models of one vocabulary"
        )
    return size


def _is_padded(size: int, width: int) -> bool:
    """Whether width is size rounded up to a multiple of some power of two."""
    multiple = 1
    while multiple <= _LARGEST_MULTIPLE:
        if width == -(-size // multiple) * multiple:
            return True
        multiple *= 2
    return False


def _check_texts(ours: Mapping[str, int], theirs: Mapping[str, int], name: str) -> None:
    if ours == theirs:
        return
    mine, other = ({index: text for text, index in vocabulary.items()} for vocabulary in (ours, theirs))
    unequal = [i for i in sorted(mine.keys() | other.keys()) if mine.get(i) != other.get(i)]
    if not unequal:  # two texts of one id, in another order
        unequal = sorted({index for text, index in ours.items() ^ theirs.items()})
    listed = ", ".join(f"{i} is {_text(mine, i)} and {_text(other, i)}" for i in unequal[:_SHOWN])
    raise VocabularyError(
        f"vocabulary: {len(unequal)} ids mean one token to the reference model and another to {name}: {listed}{_more(len(unequal))}; "
        "only models with the same vocabulary can be mixed"
    )


def _text(texts: Mapping[int, str], index: int) -> str:
    return repr(texts[index]) if index in texts else "no token"


def _more(count: int) -> str:
    return f", and {count - _SHOWN} more" if count > _SHOWN else ""


def _check_special(reference: Any, other: Any, name: str) -> None:
    for kind in ("bos", "eos", "pad"):
        mine, theirs = (getattr(tokenizer, f"{kind}_token_id") for tokenizer in (reference, other))
        if mine == theirs or (kind == "pad" and None in (mine, theirs)):
            continue
        mine_text, theirs_text = (getattr(tokenizer, f"{kind}_token") for tokenizer in (reference, other))
        if kind == "eos":  # a base and its chat model often differ here, and mean the same by every id
            _log.warning(
                "eos token: it is %s (%r) to the reference model and %s (%r) to %s; each ends the answers it takes part in",
                mine, mine_text, theirs, theirs_text, name,
            )  # fmt: skip
            continue
        raise VocabularyError(
            f"{kind} token: it is {mine} ({mine_text!r}) to the reference model and {theirs} ({theirs_text!r}) to {name}; "
            f"if that does no harm, set {kind}_token of one tokenizer to the other's"
        )


def _backend(tokenizer: Any) -> dict[str, Any] | None:
    """The parts of a fast tokenizer, or None of one that has no such description."""
    backend = getattr(tokenizer, "backend_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
    return None if backend is None else json.loads(backend.to_str())


def _check_backend(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> None:
    _check_added(ours["added_tokens"], theirs["added_tokens"], name)
    mine, other = ours["model"], theirs["model"]
    _check_merges(mine.get("merges"), other.get("merges"), name)
    for part in sorted((mine.keys() | other.keys()) - {"merges"}):
        # The ids of a dictionary are compared already; a list holds the pieces' scores as well.
        if mine.get(part) != other.get(part) and not (part == "vocab" and isinstance(mine["vocab"], dict)):
            _refuse_part(f"model, {part}", mine.get(part), other.get(part), name)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if ours.get(part) != theirs.get(part):
            _refuse_part(part, ours.get(part), theirs.get(part), name)


def _check_added(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], name: str) -> None:
    # "special" says only whether the token is shown in text: that is the first tokenizer's business.
    mine, other = (
        {t["id"]: {k: v for k, v in t.items() if k != "special"} for t in tokens} for tokens in (ours, theirs)
    )
    unequal = [i for i in sorted(mine.keys() | other.keys()) if mine.get(i) != other.get(i)]
    if unequal:
        listed = "; ".join(f"{i} is {mine.get(i, 'none')} and {other.get(i, 'none')}" for i in unequal[:_SHOWN])
        raise VocabularyError(
            f"added tokens: {len(unequal)} differ between the reference model and {name}: {listed}{_more(len(unequal))}; "
            "only models whose tokenizers split text alike can be mixed"
        )


def _check_merges(ours: list[Any] | None, theirs: list[Any] | None, name: str) -> None:
    if ours == theirs:
        return
    mine, other = ours or [], theirs or []
    first = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    texts = (repr(merges[first]) if first < len(merges) else "none" for merges in (mine, other))
    raise VocabularyError(
        f"merges: the reference model has {len(mine)} and {name} {len(other)}; number {first} is {' and '.join(texts)}; "
        "only models whose tokenizers split text alike can be mixed"
    )


def _refuse_part(part: str, ours: Any, theirs: Any, name: str) -> None:
    mine, other = (json.dumps(value, ensure_ascii=False)[:200] for value in (ours, theirs))
    raise VocabularyError(
        f"{part}: it is {mine} in the reference model's tokenizer and {other} in that of {name}; "
        "only models whose tokenizers split text alike can be mixed"
    )


def _check_probes(reference: Any, other: Any, name: str) -> None:
    for text in _PROBES:
        mine, theirs = (list(tokenizer.encode(text, add_special_tokens=False)) for tokenizer in (reference, other))
        if mine != theirs:
            raise VocabularyError(
                f"splitting: {text!r} is {mine} to the reference model and {theirs} to {name}; "
                "only models whose tokenizers split text alike can be mixed"
            )
