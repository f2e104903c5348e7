"""Slow, readable re-derivations to compare with. They share no code with convscope."""
