"""Reads and writes the files of a report: whole or not at all, and checked against the schema."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

from verify.errors import BadArgument
from verify.report.document import FORMAT_VERSION

_SCHEMA = Path(__file__).with_name("schema.json")
_DIGEST = "digest"


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document with its digest, in one step: a reader sees the old file or the new one."""
    sealed = {**document, _DIGEST: _digest(document)}
    write_text(path, json.dumps(sealed, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        # mkstemp's files are for their owner only; a report is like any other file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read(path: Path) -> dict[str, Any]:
    """A report or a failure file.

    Raises BadArgument, in one line, for a file that is missing, truncated, foreign, of another
    version of the format, or not as it was written.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadArgument(f"report: cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadArgument(f"report: {path} is no text; give a report.json or failure") from error
    except json.JSONDecodeError as error:
        raise BadArgument(
            f"report: {path} is truncated or no JSON (line {error.lineno}: {error.msg});"
            " give the file as it was written"
        ) from error
    _check(path, document)
    return document


def validate(document: Mapping[str, Any]) -> None:
    """Raise jsonschema.ValidationError where a document is not as the schema says."""
    _validator().validate(document)


def _check(path: Path, document: Any) -> None:
    given = document.get("format") if isinstance(document, dict) else None
    if given not in ("shardproof report", "shardproof failure"):
        raise BadArgument(
            f"report: {path} is not of shardproof; give a report.json or a file of failures/"
        )
    if document.get("format_version") != FORMAT_VERSION:
        raise BadArgument(
            f"report: {path} has format version {document.get('format_version')!r}, this"
            f" shardproof reads {FORMAT_VERSION}; use the version that wrote it"
        )
    if document.get(_DIGEST) != _digest(document):
        raise BadArgument(
            f"report: {path} was changed after it was written (its digest does not fit);"
            " give the file as it was written"
        )
    error = next(iter(_validator().iter_errors(document)), None)
    if error is not None:
        place = "/".join(map(str, error.absolute_path)) or "the file"
        message = " ".join(error.message.split())[:200]
        raise BadArgument(f"report: {path} is not as its schema says, at {place}: {message}")


def _digest(document: Mapping[str, Any]) -> str:
    """SHA-256 over all but the digest itself."""
    rest = {name: value for name, value in document.items() if name != _DIGEST}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


@cache
def _validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(_SCHEMA.read_text(encoding="utf-8"))
    return jsonschema.Draft202012Validator(schema)
