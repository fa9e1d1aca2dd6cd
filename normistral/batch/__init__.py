"""Batch jobs: input and output files, a journal for resuming, models on this machine or on Ray."""
