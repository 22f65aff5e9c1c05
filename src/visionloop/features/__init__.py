"""The embedding table: images as vectors, computed once, for training without a backbone pass, search and maps."""
