"""visionloop keeps an image classifier up to date: ingest, train, judge, promote, serve."""

__version__ = "0.1.0"
