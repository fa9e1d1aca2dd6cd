"""Engines, sampling, generation, chats, sessions. Needs no torch and no transformers."""
