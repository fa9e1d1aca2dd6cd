"""Backends of the worker process: many requests at once on one model."""
