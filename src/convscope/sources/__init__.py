"""Load models from names, files and objects, one module per origin."""
