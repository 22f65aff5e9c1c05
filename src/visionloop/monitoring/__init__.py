"""Watches what is served, and decides when to retrain."""
