"""Definitions of the terms that the pages use."""

from __future__ import annotations

GLOSSARY: dict[str, str] = {
    "network": "A function, composed of layers, whose parameters were learned from images. A classifier maps an image "
    "to one score per class.",
    "layer": "One step of the network. A convolutional layer maps a stack of feature maps to another stack.",
    "unit": "One feature map of a layer: the response of one filter at all positions. Also called channel or filter.",
    "class": "One of the categories that the network distinguishes.",
    "logit": "The score of a class before the softmax turns all scores into probabilities.",
    "probability": "The softmax of the logits: between 0 and 1, and 1 in total. A high probability does not guarantee "
    "that a prediction is correct.",
    "activation": "The value of a unit at one position. After a ReLU, 0 means that the unit does not respond.",
    "activation map": "The activations of a unit at all positions, shown as an image: the brighter, the higher.",
    "heatmap": "The evidence for a class at each position of the image, shown as colors on top of it.",
    "positive evidence": "Regions that increase the score of the class. Negative values are set to 0.",
    "signed evidence": "Both evidence for and evidence against the class, on a diverging color scale.",
    "contrast class": "The class to contrast with: the heatmap then shows the evidence for the difference between the "
    "logits of the two classes.",
    "deletion": "A faithfulness metric. The most important pixels are removed step by step, and the probability of the "
    "class is recorded. The metric is the area under the curve; lower is better.",
    "insertion": "A faithfulness metric. The most important pixels are added to a blurred image step by step, and the "
    "probability of the class is recorded. The metric is the area under the curve; higher is better.",
    "faithfulness": "How well a heatmap reflects what the network uses. Deletion and insertion measure it with the "
    "network itself.",
    "pattern": "An image that maximises the activation of a unit or the logit of a class. It is found by gradient "
    "ascent from noise (feature visualization).",
    "negative pattern": "An image that minimises the activation of a unit.",
    "diverse patterns": "Several patterns of one unit, optimised together to differ from each other. They show whether "
    "a unit responds to more than one feature.",
    "concept": "A direction in the space of a layer's activations that recurs in images of a class, found by "
    "non-negative matrix factorisation.",
    "importance": "The total Sobol index of a concept, between 0 and 1: the fraction of the variance of the class's "
    "logit that involves the concept when all concepts are masked at random. The sum over concepts can exceed 1.",
    "effect": "The decrease of the class's logit when the item is removed. It is negative for evidence against the "
    "class.",
    "atlas": "A two-dimensional map of the activation vectors of a layer. Similar vectors are close to each other, and "
    "each cell shows a pattern for the mean of its vectors.",
    "vector": "The activations of all units of a layer at one position of an image.",
    "top patches": "The regions of images in the data set with the highest activations of a unit.",
    "receptive field": "The region of the image that can influence one position of a layer.",
    "stride": "The distance in pixels of the image between neighbouring positions of a layer.",
    "dead": "A unit that is constant on an image, or that never has a positive activation on a data set.",
    "sparsity": "The fraction of activations that are not positive.",
    "selectivity": "The class selectivity index (m1 - m2) / (m1 + m2), where m1 is the mean of the class with the "
    "highest mean and m2 the mean of all other classes. 1 means that a unit responds to one class only.",
    "relevance": "The contribution of a unit to the logit of a class: activation times gradient, summed over all "
    "positions.",
    "top decile share": "The fraction of a layer's total positive activation that its most active 10 % of units "
    "contribute.",
    "similar units": "Units whose maxima on the same images are correlated (Pearson's r).",
    "nearest features": "The features of a dictionary whose decoder vectors point in the most similar directions.",
    "story": "Patterns of a sample of units of each stage of the network, from the first layer to the classes.",
    "dominant frequency": "The spatial frequency with the most energy in a pattern, in cycles per pixel. 0.5 alternates"
    " at every pixel; 0.05 has a period of 20 pixels.",
    "orientation selectivity": "How much of a pattern's structure has a single orientation, between 0 and 1.",
    "colorfulness": "The metric of Hasler and Süsstrunk (2003): 0 is gray, 33 moderately and 82 highly colorful.",
    "loss": "The cross-entropy of the prediction with respect to the label; 0 is a certain, correct prediction.",
    "unit name": "The word whose scores on the images of the data set go best with the activations of a unit. Its "
    "score is the area under the ROC curve on images that did not serve the choice: 0.5 is chance, 1 is perfect.",
    "percentile": "The fraction of the images in the store's sample that excite a unit less than the image does; those "
    "that excite it as much count half.",
    "store": "The results of `convscope scan`: the statistics and top patches of all units on a data set.",
}
