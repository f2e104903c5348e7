"""Data sets as catalogues: images in a fixed order, with labels, read one by one."""
