"""Figures of results, one module per kind of result."""

from convscope.plotting import concepts, figures, store, story

__all__ = ["concepts", "figures", "store", "story"]
