"""Training: from prepared arrays to a bundle."""
