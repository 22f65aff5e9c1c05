"""Zip archives of strangers, read within bounds. Nothing is extracted to disk."""
