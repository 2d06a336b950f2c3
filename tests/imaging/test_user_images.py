"""Files that the user names: images, folders and masks, and the errors for invalid ones."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.imaging.user_images import list_images, mask_from_image, mask_path, read_image


def message(error: pytest.ExceptionInfo[UserError]) -> str:
    return str(error.value)


def save(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def test_an_image_is_read_in_rgb(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    image = read_image(save(tmp_path / "a.png", pixels))
    np.testing.assert_array_equal(image, pixels)
    assert read_image(save(tmp_path / "gray.png", pixels[..., 0])).shape == (5, 7, 3)


def test_a_missing_file_and_a_file_that_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("text")
    for name, reason in (
        ("none.png", "No such file or directory"),
        ("text.png", "is none of JPEG, PNG, WEBP, GIF, BMP"),
    ):
        with pytest.raises(UserError) as error:
            read_image(tmp_path / name)
        assert message(error).startswith(f"{tmp_path / name}: {reason}; give an image (.png, ")


def test_images_of_a_folder_are_sorted_by_name(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / name).touch()
    assert list_images(tmp_path) == [tmp_path / "a.JPG", tmp_path / "b.png"]
    assert list_images(tmp_path / "b.png") == [tmp_path / "b.png"]


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        list_images(tmp_path)
    assert message(error).startswith(f"{tmp_path}: no image in this folder (.png, ")


def test_two_images_whose_results_would_have_one_name(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        (tmp_path / name).touch()
    with pytest.raises(UserError) as error:
        list_images(tmp_path)
    expected = f"{tmp_path}: two images have the same name with different suffixes"
    assert message(error).startswith(expected)


def test_a_mask_for_all_images_or_one_per_image(tmp_path: Path) -> None:
    assert mask_path(Path("images/a.jpg"), tmp_path) == tmp_path / "a.png"
    assert mask_path(Path("images/a.jpg"), tmp_path / "mask.png") == tmp_path / "mask.png"


def test_a_mask_is_true_where_its_image_is_white() -> None:
    luma = np.array([[0, 127, 128], [255, 0, 255]], np.uint8)
    mask = mask_from_image(luma[..., None].repeat(3, -1), (2, 3, 3), "m.png", "a.png")
    np.testing.assert_array_equal(mask, luma >= 128)


def test_a_mask_of_another_size() -> None:
    with pytest.raises(UserError) as error:
        mask_from_image(np.full((2, 3, 3), 255, np.uint8), (4, 5, 3), "m.png", "a.png")
    assert message(error) == (
        "m.png: the mask has 3 x 2 pixels and a.png 5 x 4; give a mask of the image's size, "
        "white where pixels are to be generated"
    )


def test_a_mask_without_white_pixels() -> None:
    with pytest.raises(UserError) as error:
        mask_from_image(np.zeros((2, 3, 3), np.uint8), (2, 3, 3), "m.png", "a.png")
    assert message(error) == "m.png: no pixel is white; make white what is to be generated"
