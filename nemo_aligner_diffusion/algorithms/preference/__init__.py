"""Learning from preferences between two pictures of a prompt."""
