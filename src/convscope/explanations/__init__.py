"""Explain predictions by the few units or features that carry them, with a proof by removal."""
