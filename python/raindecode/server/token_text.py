"""Texts of single tokens, for lists of log-probabilities: what each adds to a text, and its bytes."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from raindecode.text import Codec

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # what sentencepiece writes for a space


@cache
def _bytes_of_characters() -> dict[str, int]:
    """How byte-level tokenizers spell bytes: printable Latin-1 as itself, the others from U+0100 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    made = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in plain)
    made.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return made


class TokenTexts:
    """Texts of one vocabulary, looked up once each."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._special = frozenset(codec.tokenizer.all_special_ids)
        self._is_byte_level = _is_byte_level(codec.tokenizer)
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text; an unfinished character's bytes are not UTF-8 by themselves."""
        if token not in self._known:
            self._known[token] = self._bytes(token)
        return self._known[token]

    def is_special(self, token: int) -> bool:
        """Whether it marks something, such as an end, and is left out of texts."""
        return token in self._special

    def text_of(self, token: int) -> str:
        """The same as text; where it is none by itself, "bytes:" with the bytes, as OpenAI writes it."""
        raw = self.bytes_of(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _bytes(self, token: int) -> bytes:
        spelled = self._codec.tokenizer.convert_ids_to_tokens(token)
        if not isinstance(spelled, str):  # padding of the model's vocabulary
            return f"<{token}>".encode()
        if token in self._special:
            return spelled.encode()
        if self._is_byte_level:
            known = _bytes_of_characters()
            if all(character in known for character in spelled):
                return bytes(known[character] for character in spelled)
            return spelled.encode()
        byte = _BYTE.fullmatch(spelled)
        return bytes([int(byte[1], 16)]) if byte else spelled.replace(_SPACE, " ").encode()


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    return any(one.get("type") == "ByteLevel" for one in (decoder, *decoder.get("decoders", ())))
