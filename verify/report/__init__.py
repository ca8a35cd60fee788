"""The report of a run: `report.json`, one file for each failure, and `index.html`."""

from verify.report.document import RunFacts, describe_failure, describe_run
from verify.report.files import read, write

__all__ = ["RunFacts", "describe_failure", "describe_run", "read", "write"]
