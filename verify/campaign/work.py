"""What a worker does: one unit, as `shardproof run` in a process of its own."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from verify.campaign.journal import read_examples
from verify.parent import die_with_parent


def do(arguments: Sequence[str], folder: str, examples: Mapping[str, str], timeout: float) -> str:
    """Run `shardproof run` with these arguments in a folder, on a database of these examples.

    Returns JSON: `document`, the run's report, or None with `said`, the last it said; and
    `examples`, the failing examples that are new. The process ends with this one, and after
    `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="shardproof-unit-") as name:
        report, database = Path(name, "report"), Path(name, "examples")
        database.mkdir()
        for path, content in examples.items():
            (database / path).parent.mkdir(parents=True, exist_ok=True)
            (database / path).write_bytes(base64.b64decode(content))
        more = ["--report", str(report), "--database", str(database)]
        said = _run([*arguments, *more], folder, timeout)
        written = report / "report.json"
        document = json.loads(written.read_text(encoding="utf-8")) if written.exists() else None
        if document is not None and not document["finished"]:
            document = None
        found = {p: c for p, c in read_examples(database).items() if p not in examples}
    return json.dumps({"document": document, "examples": found, "said": said})


def _run(arguments: Sequence[str], folder: str, timeout: float) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "verify", "run", *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=timeout,
            preexec_fn=die_with_parent,
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {timeout:g} s"
    words = done.stderr.strip().splitlines()
    return f"exit code {done.returncode}" + (f": {words[-1]}" if words else "")
