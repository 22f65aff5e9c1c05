"""Watches what is served, window by window, and decides when to retrain."""
