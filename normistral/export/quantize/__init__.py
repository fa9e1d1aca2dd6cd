"""Rounding of weights to 4 or 8 bits, for both formats: to nearest, with searched scales, or with GPTQ."""
