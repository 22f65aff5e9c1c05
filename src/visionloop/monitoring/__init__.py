"""Watches what is served: drift, quality, and data that is broken, window by window, from the prediction log."""
