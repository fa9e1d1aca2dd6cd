"""Drafting: guess the next tokens without a second model, and let the model check them in one forward."""
