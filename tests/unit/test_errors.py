"""Errors are one line with a place, and know their exit code."""

import pickle

from visionloop.errors import NotPromoted, ParamsError, TrackingError, shorten


def test_message_has_four_parts() -> None:
    error = ParamsError("params.yaml prepare.image_size", "got 0", "an integer >= 32", "Edit the file.")
    assert str(error) == "params.yaml prepare.image_size: got 0; expected an integer >= 32. Edit the file."
    assert (error.code, error.exit_code, error.transient) == ("params_error", 2, False)
    assert isinstance(error, ValueError)


def test_kinds_know_exit_code_and_whether_to_try_again() -> None:
    assert NotPromoted("gate", "refused").exit_code == 3
    assert TrackingError("MLflow", "down").transient


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ParamsError("a", "b", "c", "d")))
    assert str(error) == "a: b; expected c. d"


def test_lists_are_sorted_and_cut_at_five() -> None:
    assert shorten(["b", "a"]) == "a, b"
    assert shorten([str(i) for i in range(8)]) == "0, 1, 2, 3, 4 and 3 more"
