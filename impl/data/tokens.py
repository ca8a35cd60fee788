"""The tokens of a text in a file, made once and then mapped into memory by every process.

The file is numpy's `.npy`, of uint16, read without pickle. Its name has a digest of the text and
the name of the tokenizer, so that another text has another file.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np

from impl.data.tokenizer import ByteTokenizer


def token_file(text: Path, *, cache: Path, tokenizer: ByteTokenizer) -> Path:
    """The file of a text's tokens in the folder `cache`, made if it is not there.

    Any number of processes may call it at once: each writes a file of its own, and renames it.
    ValueError for a text that cannot be read or is no UTF-8, and a cache that cannot be written.
    """
    try:
        octets = text.read_bytes()
        digest = hashlib.sha256(octets).hexdigest()[:16]
        path = cache / f"{text.stem}-{tokenizer.name}-{digest}.npy"
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            _write(path, tokenizer.encode(octets.decode()))
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {text} is no UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise ValueError(f"text: {error.filename or text}: {error.strerror}") from error
    return path


def open_tokens(path: Path) -> np.ndarray:
    """The tokens of a file, mapped into memory, read-only. ValueError for another file."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise ValueError(f"tokens: {path}: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise ValueError(f"tokens: {path} is truncated, or no file of tokens") from error
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise ValueError(f"tokens: {path} has {tokens.dtype} {list(tokens.shape)}, not uint16 [n]")
    return tokens


def _write(path: Path, tokens: np.ndarray) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        try:
            np.save(file, tokens, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
