"""`make sim`: random scenarios on every core, until one breaks a rule."""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback

import click

from cli.simulation import make_node
from scheduler.sim.rule_checker import Violation
from scheduler.sim.scenarios import run_random


def attempt(seed: int) -> tuple[int, int, str | None]:
    """(seed, requests, what went wrong or None)."""
    try:
        return seed, run_random(seed, make_node).requests, None
    except Violation as violation:
        return seed, 0, str(violation)
    except Exception:  # a core that raises is a failure with its own replay
        return seed, 0, traceback.format_exc(limit=-4)


@click.command()
@click.option("--count", type=click.IntRange(min=1), default=10_000, show_default=True)
@click.option("--first", type=int, default=0, show_default=True, help="The first seed.")
@click.option("--jobs", type=click.IntRange(min=1), default=multiprocessing.cpu_count())
@click.option("--keep-going", is_flag=True, help="Report every failure, not the first one only.")
def main(count: int, first: int, jobs: int, keep_going: bool) -> None:
    """Run COUNT seeds; the status is 1 if one failed."""
    began, done, requests, failed = time.monotonic(), 0, 0, 0
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs) as pool:
        for seed, ended, error in pool.imap_unordered(
            attempt, range(first, first + count), chunksize=4
        ):
            done, requests = done + 1, requests + ended
            if error is not None:
                failed += 1
                click.echo(f"\nseed {seed}: {error.rstrip()}")
                click.echo(f"replay: stoker simulate --scenario random --seed {seed}")
                if not keep_going:
                    break
            if done % 50 == 0 or done == count:
                rate = done / (time.monotonic() - began)
                click.echo(
                    f"{done} of {count} scenarios, {requests} requests, {failed} failed,"
                    f" {rate:.1f} a second, {(count - done) / rate:.0f} s left"
                )
        pool.terminate()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
