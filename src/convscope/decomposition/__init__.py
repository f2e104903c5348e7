"""Decompose the activations of a layer over many images: concepts of a class (CRAFT) and activation atlases."""
