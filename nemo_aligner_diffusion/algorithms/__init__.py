"""What is supervised: one short file per method, and the Lightning modules that run them."""
