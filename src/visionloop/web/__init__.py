"""The one way out to the network: which addresses, how fast, how much."""
