"""Judging a model on the test side: figures with intervals, pictures, a report. Changes nothing in the world."""
