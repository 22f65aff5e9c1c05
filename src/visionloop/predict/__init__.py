"""Batch prediction: what is found and answered (`files.py`), kept (`chunks.py`), written (`tables.py`)."""
