"""Earlier place of `normistral.batch.run`; a documented path."""

from normistral.batch.job import Workers
from normistral.batch.run import run_batch

__all__ = ["Workers", "run_batch"]
