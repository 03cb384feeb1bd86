"""Values that wait for the convolution that reads them: how a module's own code runs fused halves of residual blocks."""
