"""Batch prediction: what is found and answered (`files.py`, `films.py`), kept (`chunks.py`), written (`tables.py`)."""
