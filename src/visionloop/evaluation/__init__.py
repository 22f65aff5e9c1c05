"""Judging a model on the test side: figures with intervals, pictures, a report. It promotes nothing."""
