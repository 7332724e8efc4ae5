"""A schedule that leaves every block at one of its rows, as self forcing trains on.

What it is: another scheduler's rows, cut short; the last one ends at level 0.
What it does not know: why anybody leaves early, models, caches.
"""

from dataclasses import replace
from typing import Any

from ..errors import check_count
from .base import Row
from .flow import LevelScheduler


class EarlyExit:
    """A scheduler that leaves a block at one of its rows: that row's clean prediction is it."""

    def __init__(self, scheduler: LevelScheduler, exit_row: int) -> None:
        """Cut a scheduler short.

        Args:
            scheduler: The whole schedule.
            exit_row: Last row that runs, from 0; at or beyond the end nothing is cut.

        Raises:
            UsageError: a row below 0.
        """
        check_count("exit_row", exit_row, 0)
        self.inner, self.exit_row = scheduler, exit_row
        self.config = scheduler.config

    def rows(self, num_steps: int | None = None, start: float = 1.0) -> list[Row]:
        """List the rows up to the exit, which ends at level 0; see `LevelScheduler.rows`."""
        rows = self.inner.rows(num_steps, start)[: self.exit_row + 1]
        rows = [replace(row, num_rows=len(rows)) for row in rows]
        return [*rows[:-1], replace(rows[-1], level_next=0.0)]

    def __getattr__(self, name: str) -> Any:
        """Ask the whole schedule for everything else."""
        return getattr(self.inner, name)
