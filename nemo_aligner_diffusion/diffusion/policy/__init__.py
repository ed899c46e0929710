"""A trajectory as a chain of Gaussian transitions: their densities, and the gradient of those (policy gradients)."""
