"""Our own small versions of the GANs that people train: one file a family, layers used as the usual programs use them.

`Generator`, `Discriminator` and `generator_plan` here are SNGAN's, which ``ddst train`` trains; every network stands by
name in `ddst.models.registry`. All take torch only, none knows of sparse layers.
"""

from ddst.models.sngan import Discriminator, Generator, generator_plan

__all__ = ["Discriminator", "Generator", "generator_plan"]
