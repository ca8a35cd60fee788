"""What a run tells: a JSON line for each step, and lines to look at."""

from __future__ import annotations

import sys
from collections import deque

from impl.pretrain.options import Options
from impl.pretrain.plot import write_plot
from impl.pretrain.records import Record, line_of, read_log, write_log


class Log:
    """Of rank 0. Of a file that is there already, the lines of steps up to `after` stay: those of
    the run that is resumed. ValueError where it cannot be written or is no log."""

    def __init__(self, options: Options, *, after: int) -> None:
        self.options = options
        self._recent: deque[Record] = deque(maxlen=options.log_interval)
        if options.log is not None:
            kept = [each for each in read_log(options.log) if each.step <= after] if after else []
            write_log(options.log, kept)

    def add(self, record: Record) -> None:
        """Write down a step, and show every so many."""
        if self.options.log is not None:
            with self.options.log.open("a", encoding="utf-8") as file:
                file.write(line_of(record))
        self._recent.append(record)
        if record.step % self.options.log_interval == 0 or record.step == self.options.steps:
            rate = sum(r.tokens for r in self._recent) / sum(r.seconds for r in self._recent)
            further = "".join(f" {loss:.4f}" for loss in record.further)
            norm = "skipped" if record.skipped else f"grad norm {record.grad_norm:.3f}"
            self.say(
                f"step {record.step}/{self.options.steps}  loss {record.loss:.4f}{further}"
                f"  {norm}  lr {record.lr:.2e}  {rate:,.0f} tokens/s"
            )

    def end(self, *, already: int) -> None:
        """The plot, if one is wanted."""
        if already >= self.options.steps:
            self.say(f"nothing to do: {already} of {self.options.steps} steps are done")
        if self.options.plot is not None and self.options.log is not None:
            write_plot({str(self.options.layout()): self.options.log}, self.options.plot)
            self.say(f"written {self.options.plot}")

    def say(self, text: str) -> None:
        """A line for who looks on."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
