"""Engines that answer many requests at once, in the worker process."""
