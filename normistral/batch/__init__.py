"""Answers to many documents: input and output files, a journal of what is done, models on this machine or on Ray."""
