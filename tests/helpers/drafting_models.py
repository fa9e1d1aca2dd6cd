"""Scripted models that draft as a test says, however fast the machine is."""

import numpy as np

from normistral.runtime.speculative.draft_length import StepCosts


class FixedLength(StepCosts):
    """Drafts a fixed number of tokens wherever there is a draft."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def choose(self, rates, context=0):
        return min(self.length, len(rates))


def draft_always(model, length=4):
    """Let this model feed drafts of `length` tokens, pay or not; also under a seed, so that runs can be compared."""
    model._step_costs = FixedLength(length)
    model._drafts = lambda config: config.draft != "off"
    return model


def repetitive_logits(vocabulary, period=7, share=0.85):
    """Logits that for this share of the places go on with what stood `period` tokens before."""

    def next_logits(token_ids):
        noise = np.random.default_rng(token_ids)
        logits = noise.normal(0.0, 2.0, vocabulary).astype(np.float32)
        if noise.random() < share:
            logits[token_ids[-period % len(token_ids)]] += 9.0
        return logits

    return next_logits
