"""Labels and sides from where files lie: names, patterns, layouts, and safe ways to a file that data names."""
