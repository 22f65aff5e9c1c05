"""Videos: frames, by a process of its own (`player.py`, `worker.py`, `decode.py`); what they show (`timeline.py`)."""
