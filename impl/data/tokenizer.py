"""Bytes as tokens: no vocabulary to learn or to lose, and any text can be encoded."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class ByteTokenizer:
    """One token for each byte of a text in UTF-8, and one for its end."""

    name = "bytes"
    end = 256
    vocabulary = 257

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text and its end, uint16."""
        octets = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)
        return np.append(octets, np.uint16(self.end))

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, without ends; U+FFFD stands for bytes that are no UTF-8.

        ValueError for a token outside of the vocabulary.
        """
        octets = bytearray()
        for token in map(int, tokens):
            if not 0 <= token < self.vocabulary:
                raise ValueError(f"tokens: {token} is not one of 0 to {self.vocabulary - 1}")
            if token != self.end:
                octets.append(token)
        return octets.decode(errors="replace")
