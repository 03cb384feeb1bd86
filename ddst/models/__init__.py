"""GAN models whose convolution and linear layers `ddst.sparsify` can swap."""

from ddst.models.sngan import Discriminator, Generator, generator_plan

__all__ = ["Discriminator", "Generator", "generator_plan"]
