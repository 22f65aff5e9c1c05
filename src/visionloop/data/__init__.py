"""Images, manifests, sides and prepared arrays."""
