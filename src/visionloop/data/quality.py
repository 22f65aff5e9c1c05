"""What a picture is like, in three numbers: the slices of an evaluation and the log of the server measure the same.

Dimensions in names: n images, h rows, w columns.
"""

import numpy as np
from numpy.typing import NDArray

from visionloop.data.images import UInt8Array


def measure_images(images_nhwc: UInt8Array) -> dict[str, NDArray[np.float64]]:
    """Return the brightness, the contrast and the sharpness of images, (n,) each.

    Brightness is the mean of the grey values, 0 to 1, and contrast their standard deviation. Sharpness is the variance
    of the Laplacian of the grey values (Pech-Pacheco 2000), at the size the model sees.
    """
    grey_nhw = images_nhwc @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    edges = grey_nhw[:, 1:-1, 1:-1] * -4
    for rows, columns in ((slice(2, None), slice(1, -1)), (slice(-2), slice(1, -1))):
        edges = edges + grey_nhw[:, rows, columns] + grey_nhw[:, columns, rows]
    return {
        "brightness": grey_nhw.mean(axis=(1, 2)).astype(np.float64),
        "contrast": grey_nhw.std(axis=(1, 2)).astype(np.float64),
        "sharpness": edges.var(axis=(1, 2)).astype(np.float64),
    }
