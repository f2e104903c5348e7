"""Acceleration of forward and backward passes: `accelerate` is the only entry point."""

from convscope.engine.acceleration.api import ENVIRONMENT_VARIABLE, accelerate
from convscope.engine.acceleration.conv_fusion import PIECES

__all__ = ["ENVIRONMENT_VARIABLE", "PIECES", "accelerate"]
