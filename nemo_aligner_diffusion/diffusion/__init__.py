"""How an image is made: model families, guidance, sampler and the differentiable trajectory."""
