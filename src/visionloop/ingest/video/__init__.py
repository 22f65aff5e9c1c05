"""Videos as a source: their frames are asked for by `video/player.py`, and kept by `clip.py`."""
