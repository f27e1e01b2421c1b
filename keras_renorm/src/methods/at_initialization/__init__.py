"""Pruning at initialization: the first epochs of the one training run decide which weights stay.

Source: M. Haroon, What to prune and what not to prune at initialization, arXiv 2209.02201. Its abstract was available, its
formulas were not. Where the abstract is silent, the variant that measures best was taken (`docs/at_initialization.md`).
"""
