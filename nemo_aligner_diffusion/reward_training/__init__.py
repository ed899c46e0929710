"""Training a reward of one's own: preferences between two pictures of a prompt in, a CLIP reward ``.nemo`` out."""
