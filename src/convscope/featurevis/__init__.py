"""Feature visualisation: objectives, image parameterizations, transforms, update rules, and recipes made of them."""
