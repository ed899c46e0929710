"""Policy gradients: learning from rewards that are numbers and need no gradient."""
