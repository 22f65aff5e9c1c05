"""From the world into the store: sources, validation, dataset versions."""
