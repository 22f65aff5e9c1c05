"""Video: decoded in a process of its own (`worker.py`), asked for frames by `player.py`, kept by `clip.py`."""
