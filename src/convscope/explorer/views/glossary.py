"""The words that the pages use, for somebody who meets them for the first time."""

from __future__ import annotations

WORDS: dict[str, str] = {
    "network": "A chain of computing steps that has learned from many labelled pictures to say what a picture shows.",
    "layer": "One step of the chain. It turns a stack of small pictures, its maps, into another stack.",
    "unit": "One map of a layer: a detector for one feature, such as an edge, a fur texture or an eye. Also called "
    "channel or filter.",
    "class": "One of the kinds of things that the network can name.",
    "logit": "The score that the network gives a class, before all scores are turned into shares that add up to 1.",
    "probability": "The network's belief in a class, as a share of 1. It says how sure the network is, not how right.",
    "activation": "How strongly a unit answers at a place of the picture. Nought or less means: not at all.",
    "activation map": "A unit's answer at every place of the picture, drawn as a picture: bright where it is strong.",
    "heatmap": "A map of which places of the picture speak for a class, and (signed) which speak against it.",
    "rectified": "Only the evidence for the class is shown.",
    "signed": "Evidence against the class is shown too, in the other colour.",
    "contrast class": "Asks why the network says this class rather than another: what speaks for both is taken off.",
    "deletion": "A test of a heatmap: its hottest places are taken away first. The quicker the network loses its "
    "belief, the better; so lower is better.",
    "insertion": "A test of a heatmap: its hottest places are shown first. The quicker the network finds its belief, "
    "the better; so higher is better.",
    "faithfulness": "Whether a heatmap shows what the network really uses. Deletion and insertion measure it.",
    "pattern": "A picture made by the computer, from noise, so that one unit answers as strongly as it can.",
    "negative pattern": "A picture that makes the unit answer as little as it can.",
    "diverse patterns": "Several patterns for one unit that are made to differ: a unit may like more than one thing.",
    "concept": "Something that recurs in the pictures of a class, as a layer sees it: an eye, a striped fur, the grass "
    "around. The layer's activations are taken apart into a few concepts that add up to them.",
    "importance": "From 0 to 1: how much of the ups and downs of the class's score a concept takes part in when the "
    "concepts are turned up and down at random (the total Sobol index). Together they may be more than 1.",
    "effect": "By how much the class's score falls when this is taken out; negative where it speaks against the class.",
    "atlas": "A map of what a layer tells apart. What it makes of thousands of places in pictures is laid out so that "
    "alike lies beside alike; each region is shown by a pattern that the computer drew for it.",
    "vector": "All activations of a layer at one place of a picture: what the layer makes of that place.",
    "top patches": "The parts of real pictures that excite a unit most.",
    "receptive field": "The part of the picture that one place of a layer can see.",
    "stride": "How many pixels of the picture lie between neighbouring places of a layer.",
    "dead": "A unit that says the same everywhere (on this picture), or, in a data set, never answers at all.",
    "sparsity": "The share of values in a layer that are nought or less: how few places are busy.",
    "selectivity": "From 0 to 1: how much more a unit answers to its favourite class than to the others.",
    "relevance": "How much a unit adds to a class's score on this picture: its activation times what the score gains "
    "by it, summed over all places.",
    "busiest tenth": "The share of a layer's activation that the busiest tenth of its units holds.",
    "similar units": "Units whose strongest answers to the same pictures go up and down together.",
    "story": "A walk through the network from its first layer to its classes: what units of each stage look for.",
    "dominant frequency": "How fine a pattern's strongest structure is, in waves for each pixel: 0.5 changes from each "
    "pixel to the next, 0.05 takes 20 pixels.",
    "orientation selectivity": "From 0 to 1: how much a pattern's structure runs in one direction only.",
    "colourfulness": "0 is gray, 33 moderately colourful, 82 and more highly.",
    "loss": "How surprised the network is by a picture's true label: 0 if it was sure of it.",
    "store": "A folder with what every unit did on a whole data set, made by `convscope scan`.",
}
