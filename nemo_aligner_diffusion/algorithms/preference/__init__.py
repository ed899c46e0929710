"""Learning from pairs of pictures, without a reward: one file a method."""
