"""Weights that stay packed wherever they are used, in layers of this package and in modules of other people."""
