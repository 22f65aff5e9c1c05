"""Forget images for good: out of the dataset, the store, and every copy that visionloop and dvc made of them.

`resolve` says which images are meant, `dataset` makes the version without them, `copies`, `bundles` and `dvc_cache`
find what else holds them, `hidden` goes through `.visionloop`. `run` does it all, in an order in which a second run
finishes what a killed one has begun, and lists what stays.
"""

from visionloop.forget.resolve import Wanted, resolve_images
from visionloop.forget.run import Everything, Forgotten, find_everything, forget

__all__ = ["Everything", "Forgotten", "Wanted", "find_everything", "forget", "resolve_images"]
