"""The only way to other servers over HTTP: which addresses, how fast, how much."""
