"""Acceleration of forward and backward passes: `accelerate` is the only entry point."""

from convscope.engine.acceleration.api import ENVIRONMENT_VARIABLE, accelerate

__all__ = ["ENVIRONMENT_VARIABLE", "accelerate"]
