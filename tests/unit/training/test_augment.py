"""Augmentation: presets stay within their limits, and the CPU and the batched way do the same to an image."""

from pathlib import Path

import numpy as np
import pytest
import torch

from arrays import make_prepared
from visionloop.training.augment import (
    FILL_RGB,
    NUM_UNIFORM,
    PRESETS,
    Column,
    Operation,
    augment_batch,
    augment_images,
    draw_crops,
    draw_preset,
    make_theta,
    warp,
)

SIZE_HW = (48, 64)
STRONG = PRESETS["strong"]


@pytest.fixture(scope="module")
def images_nhwc(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Forty smooth images of 64 x 64, cut to 48 x 64."""
    prepared = make_prepared(tmp_path_factory.mktemp("smooth"), number=40, px=64)
    return prepared.read(np.arange(40))[:, :48]


def draw(preset: str, number: int = 4000, seed: int = 0) -> np.ndarray:
    frame_n4 = np.tile((0, 0, *SIZE_HW), (number, 1))
    return draw_preset(preset, np.random.default_rng(seed).random((number, NUM_UNIFORM)), frame_n4, SIZE_HW)


def draw_nothing(number: int) -> np.ndarray:
    return draw_crops(np.tile((0, 0, *SIZE_HW), (number, 1)))


def apply_both(images_nhwc: np.ndarray, draws_nd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    one = augment_images(images_nhwc, draws_nd, SIZE_HW)
    batch = augment_batch(torch.from_numpy(images_nhwc), torch.from_numpy(draws_nd), SIZE_HW, STRONG).numpy()
    assert one.shape == batch.shape == (len(images_nhwc), *SIZE_HW, 3)
    assert one.dtype == batch.dtype == np.uint8
    return one.astype(int), batch.astype(int)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_crops_have_the_area_and_aspect_of_the_preset_and_stay_inside(name: str) -> None:
    preset, d = PRESETS[name], draw(name).T
    assert (d[Column.TOP] >= 0).all() and (d[Column.TOP] + d[Column.HEIGHT] <= SIZE_HW[0]).all()
    assert (d[Column.LEFT] >= 0).all() and (d[Column.LEFT] + d[Column.WIDTH] <= SIZE_HW[1]).all()
    area = d[Column.HEIGHT] * d[Column.WIDTH] / (SIZE_HW[0] * SIZE_HW[1])
    assert area.min() >= preset.area[0] * 0.8, "a side that would not fit is cut"
    assert np.median(area) == pytest.approx(np.mean(preset.area), abs=0.08)
    aspect = (d[Column.WIDTH] / SIZE_HW[1]) / (d[Column.HEIGHT] / SIZE_HW[0])
    assert aspect.max() <= preset.aspect * 1.05 and aspect.min() >= 1 / preset.aspect / 1.05
    assert d[Column.MIRRORED].mean() == pytest.approx(0.5, abs=0.03)


def test_light_changes_no_colour_and_turns_nothing() -> None:
    d = draw("light")
    assert (d[:, Column.MIRRORED + 1 :] == draw_nothing(len(d))[:, Column.MIRRORED + 1 :]).all()


def test_medium_turns_half_of_the_images_and_changes_colours_within_limits() -> None:
    d = draw("medium").T
    assert (d[Column.ANGLE] != 0).mean() == pytest.approx(0.5, abs=0.03)
    assert np.abs(np.degrees(d[Column.ANGLE])).max() == pytest.approx(15, abs=0.1)
    for column in (Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION):
        assert (d[column].min(), d[column].max()) == pytest.approx((0.7, 1.3), abs=0.01)
    assert not d[Column.OPERATION].any() and not d[Column.ERASED_HEIGHT].any()


def test_strong_does_one_of_fourteen_operations_and_erases_a_quarter() -> None:
    d = draw("strong", 14_000).T
    moved = [(d[c] != 0).mean() for c in (Column.ANGLE, Column.SHEAR_X, Column.SHEAR_Y, Column.SHIFT_X, Column.SHIFT_Y)]
    factors = [(d[c] != 1).mean() for c in (Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION)]
    operations = [(d[Column.OPERATION] == op).mean() for op in tuple(Operation)[1:]]
    shares = [*moved, *factors, *operations]
    assert shares == pytest.approx([1 / 14] * 13, abs=0.01)
    assert sum(shares) == pytest.approx(13 / 14, abs=0.01), "one at a time; the fourteenth is to do nothing"
    assert (d[Column.ERASED_HEIGHT] > 0).mean() == pytest.approx(0.25, abs=0.02)
    area = d[Column.ERASED_HEIGHT] * d[Column.ERASED_WIDTH] / (SIZE_HW[0] * SIZE_HW[1])
    assert area.max() <= 0.21
    assert (d[Column.ERASED_TOP] + d[Column.ERASED_HEIGHT] <= SIZE_HW[0]).all()
    assert set(d[Column.STRENGTH][d[Column.OPERATION] == Operation.POSTERIZE]) <= set(range(2, 9))


def test_no_draws_change_nothing(images_nhwc: np.ndarray) -> None:
    for result in apply_both(images_nhwc, draw_nothing(len(images_nhwc))):
        assert (result == images_nhwc).all()


def test_a_crop_of_full_size_is_cut_and_not_interpolated(images_nhwc: np.ndarray) -> None:
    larger = np.concatenate([images_nhwc, images_nhwc[::-1]], axis=1)
    draws_nd = draw_crops(np.tile((17, 0, *SIZE_HW), (len(larger), 1)))
    for result in apply_both(larger, draws_nd):
        assert (result == larger[:, 17 : 17 + 48]).all()


def test_mirroring_is_left_to_right(images_nhwc: np.ndarray) -> None:
    draws_nd = draw_nothing(len(images_nhwc))
    draws_nd[:, Column.MIRRORED] = 1
    for result in apply_both(images_nhwc, draws_nd):
        assert (result == images_nhwc[:, :, ::-1]).all()


def test_turning_by_a_quarter_is_turning_the_array() -> None:
    square = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    moves = torch.tensor([[0.0, 0, 20, 20, 0, np.pi / 2, 0, 0, 0, 0]]).repeat(2, 1)
    turned = warp(torch.from_numpy(square).permute(0, 3, 1, 2).float(), make_theta(moves, (20, 20), (20, 20)), (20, 20))
    assert np.abs(turned.permute(0, 2, 3, 1).numpy() - np.rot90(square, axes=(1, 2))).max() < 0.05


def test_shifts_and_shears_move_the_picture_the_way_they_say(images_nhwc: np.ndarray) -> None:
    draws_nd = draw_nothing(2)
    draws_nd[0, Column.SHIFT_X], draws_nd[1, Column.SHEAR_X] = 0.25, 0.5
    moved, sheared = apply_both(images_nhwc[:2], draws_nd)[1]
    assert np.abs(moved[:, 16:] - images_nhwc[0][:, :48]).max() <= 1, "a quarter of 64 to the right"
    row = 40  # 16.5 below the middle: half of it to the left
    assert np.abs(sheared[row, :50] - images_nhwc[1][row, 8:58]).max() <= 12


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_one_by_one_and_as_a_batch_are_the_same_but_for_rounding(images_nhwc: np.ndarray, name: str) -> None:
    images = np.tile(images_nhwc, (5, 1, 1, 1))
    draws_nd = draw(name, len(images), seed=1)
    # One by one each change of colour cuts the fraction off; a few operations make more of a level of difference.
    one, batch = apply_both(images, draws_nd)
    difference = np.abs(one - batch).mean(axis=(1, 2, 3))
    steep = np.isin(draws_nd[:, Column.OPERATION], [Operation.SOLARIZE, Operation.EQUALIZE, Operation.POSTERIZE])
    assert difference[~steep].max() < 2.5
    assert np.median(difference) < (1.6 if name == "medium" else 0.7)
    assert (one != images).mean() > 0.5


@pytest.mark.parametrize("operation", tuple(Operation)[1:], ids=lambda op: op.name.lower())
def test_an_operation_is_the_same_one_by_one_and_as_a_batch(images_nhwc: np.ndarray, operation: Operation) -> None:
    draws_nd = draw_nothing(len(images_nhwc))
    draws_nd[::2, Column.OPERATION] = operation
    draws_nd[::2, Column.STRENGTH] = {Operation.SHARPNESS: 1.9, Operation.POSTERIZE: 3, Operation.SOLARIZE: 100}.get(
        operation, 0
    )
    one, batch = apply_both(images_nhwc, draws_nd)
    assert np.abs(one - batch).max() <= 1
    assert (one[1::2] == images_nhwc[1::2]).all()
    assert (one[::2] != images_nhwc[::2]).any()


def test_a_batched_image_does_not_depend_on_the_others(images_nhwc: np.ndarray) -> None:
    draws_nd = torch.from_numpy(draw("strong", len(images_nhwc), seed=2))
    images = torch.from_numpy(images_nhwc.copy())
    whole = augment_batch(images, draws_nd, SIZE_HW, STRONG)
    for picks in (torch.arange(7), torch.tensor([39, 3, 20])):
        assert (augment_batch(images[picks], draws_nd[picks], SIZE_HW, STRONG) == whole[picks]).all()
    assert (images.numpy() == images_nhwc).all(), "what stays on the device is not changed"


def test_an_erased_box_is_filled_and_nothing_else_changes(images_nhwc: np.ndarray) -> None:
    draws_nd = draw_nothing(1)
    draws_nd[0, Column.ERASED_TOP :] = (5, 10, 7, 20)
    for result in apply_both(images_nhwc[:1], draws_nd):
        assert (result[0, 5:12, 10:30] == FILL_RGB).all()
        result[0, 5:12, 10:30] = images_nhwc[0, 5:12, 10:30]
        assert (result[0] == images_nhwc[0]).all()


@pytest.mark.parametrize("size_hw", [(1, 1), (2, 5)])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_tiny_images_are_no_trouble(name: str, size_hw: tuple[int, int]) -> None:
    images_nhwc = np.full((50, *size_hw, 3), 9, np.uint8)
    draws_nd = draw_preset(name, np.random.default_rng(0).random((50, 16)), np.tile((0, 0, *size_hw), (50, 1)), size_hw)
    assert augment_images(images_nhwc, draws_nd, size_hw).shape == images_nhwc.shape
    batch = augment_batch(torch.from_numpy(images_nhwc), torch.from_numpy(draws_nd), size_hw, PRESETS[name])
    assert batch.shape == images_nhwc.shape


def test_an_image_in_a_frame_is_never_cropped_beyond_it(tmp_path: Path) -> None:
    frame_n4 = np.tile((4, 6, 32, 30), (500, 1))
    d = draw_preset("strong", np.random.default_rng(0).random((500, NUM_UNIFORM)), frame_n4, (32, 30)).T
    assert d[Column.TOP].min() >= 4 and (d[Column.TOP] + d[Column.HEIGHT]).max() <= 36
    assert d[Column.LEFT].min() >= 6 and (d[Column.LEFT] + d[Column.WIDTH]).max() <= 36
