"""Earlier place of `normistral.batch.run`."""

from normistral.batch.run import Summary, Workers, run_batch

__all__ = ["Summary", "Workers", "run_batch"]
