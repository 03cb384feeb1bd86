"""Values that wait for the convolution that reads them, so that a module's own code runs fused half blocks."""
