"""Queries that can only read, in chunks, as far as a cursor has come."""
