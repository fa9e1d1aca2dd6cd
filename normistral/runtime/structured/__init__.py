"""Answers of a given form: what tokens may follow, decided by a grammar."""
