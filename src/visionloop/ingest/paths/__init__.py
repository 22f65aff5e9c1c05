"""Labels and sides from paths: names, patterns, layouts, and safe look-up of a file that a table names."""
