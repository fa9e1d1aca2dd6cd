"""Finds the settings with which an artifact runs best on this machine: what to try, how to compare, what to keep."""
