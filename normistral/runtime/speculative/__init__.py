"""Speculative decoding by prompt lookup: tokens are guessed without a second model and checked in one forward."""
