"""Image to image: the named inputs of a batch, what the loss counts, and its configuration."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor

from pipeline.config import ConfigError
from pipeline.diffusion.process import add_noise
from pipeline.imaging.degradations import TASKS
from pipeline.nn.parameters import initialize
from pipeline.rng import Draws
from pipeline.stage.inputs import Arrays
from stages.image_to_image import ImageToImage
from tests.helpers.palette import RNG, make, random_image


@pytest.fixture(scope="module")
def stage() -> ImageToImage:
    stage = make(Path("run"), Path("shards"))
    initialize(stage.network, 0)
    return stage


@pytest.fixture(scope="module")
def residual_stage() -> ImageToImage:
    """One whose network predicts how the image differs from a prior mean."""
    tasks = {"inpainting": {"residual_std": 0.1}, "colorization": {"residual_std": 0.2}}
    stage = make(Path("run"), Path("shards"), diffusion={"prediction": "x0"}, tasks=tasks)
    initialize(stage.network, 0)
    return stage


def batch(stage: ImageToImage, images: np.ndarray, step: int = 0, first: int = 0) -> Arrays:
    positions = range(first, first + len(images))
    draws = Draws(seed=stage.config.seed, step=step, positions=positions)
    return stage.training_inputs(images, {}, draws)


def random_batch(stage: ImageToImage, num: int) -> Arrays:
    return batch(stage, np.stack([random_image() for _ in range(num)]))


def loss(stage: ImageToImage, arrays: Arrays) -> np.ndarray:
    tensors = [Tensor(array) for array in stage.loss_inputs.flatten(arrays)]
    return np.asarray(stage.loss(*tensors).asnumpy())


def test_every_task_has_its_share_of_a_batch(stage: ImageToImage) -> None:
    num = 400
    arrays = batch(stage, np.stack([random_image()] * num))
    x, source, mask, task = (arrays[name] for name in ("x", "source", "mask", "task"))
    assert task.sum(axis=1).tolist() == [1.0] * num
    assert task[:, 0].mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / num))
    for i in range(40):
        if task[i, 0]:
            assert 0.1 <= mask[i].mean() <= 0.4
            known = np.broadcast_to(mask[i] == 0, x[i].shape)
            np.testing.assert_array_equal(source[i][known], x[i][known])
        else:
            assert (mask[i] == 1).all()
            np.testing.assert_array_equal(source[i][0], source[i][2])


def test_a_task_shifts_its_noise_levels(stage: ImageToImage) -> None:
    """The same times with and without the shift."""
    tasks = {"inpainting": {}, "colorization": {"weight": 3.0}}
    images = np.stack([random_image()] * 40)
    shifted = batch(stage, images)
    plain = batch(make(Path("run"), Path("shards"), tasks=tasks), images)
    np.testing.assert_array_equal(shifted["task"], plain["task"])
    difference = shifted["logsnr"] - plain["logsnr"]
    np.testing.assert_allclose(difference, -shifted["task"][:, 0], atol=1e-5)


def test_a_position_does_not_depend_on_the_others(stage: ImageToImage) -> None:
    images = np.stack([random_image() for _ in range(4)])
    whole = batch(stage, images, step=3)
    part = batch(stage, images[2:], step=3, first=2)
    assert whole.keys() == part.keys() == set(stage.loss_inputs.names)
    for name, array in whole.items():
        assert array.dtype == (np.int32 if name == "dropout_seeds" else np.float32)
        np.testing.assert_array_equal(array[2:], part[name])


def test_the_loss_is_of_the_hole(stage: ImageToImage) -> None:
    """What lies outside of the hole changes nothing: neither the noisy image nor the target."""
    arrays = random_batch(stage, 8)
    x, mask = arrays["x"], arrays["mask"]
    assert (mask == 0).any()
    outside = np.where(mask == 1, x, RNG.standard_normal(x.shape).astype(np.float32))
    inside = np.where(mask == 1, x + 0.1, x)
    first, second, third = (loss(stage, {**arrays, "x": each}) for each in (x, outside, inside))
    np.testing.assert_array_equal(first, second)
    assert (first != third).all()


@pytest.mark.parametrize(("level", "name"), [(-20.0, "source"), (20.0, "x")])
def test_a_network_of_zeros_leaves_the_prior_mean_or_what_z_reveals(
    residual_stage: ImageToImage, level: float, name: str
) -> None:
    stage, arrays = residual_stage, random_batch(residual_stage, 4)
    named = {key: Tensor(array) for key, array in arrays.items()}
    logsnr_B = Tensor(np.full(4, level, np.float32))
    z = add_noise(named["x"], named["eps"], logsnr_B)
    output = stage.predict(stage.network, z, logsnr_B, named).asnumpy()
    np.testing.assert_allclose(output, arrays[name], atol=1e-3)


def test_errors_count_in_residual_stds(residual_stage: ImageToImage) -> None:
    """A network of zeros, in much noise: the prior mean's own error in the hole, or everywhere."""
    arrays = random_batch(residual_stage, 6)
    x, prior_mean, mask, task = (arrays[name] for name in ("x", "source", "mask", "task"))
    result = loss(residual_stage, {**arrays, "logsnr": np.full(6, -20, np.float32)})
    error = ((x - prior_mean) ** 2 * mask).mean((1, 2, 3)) / mask.mean((1, 2, 3))
    np.testing.assert_allclose(result, error / (task @ (0.1, 0.2)) ** 2, rtol=1e-3)


@pytest.mark.parametrize("level", [-20.0, 0.0, 20.0])
def test_the_network_sees_what_z_reveals_of_the_residual(
    residual_stage: ImageToImage, level: float
) -> None:
    """Beside the prior mean and the mask: nothing in much noise, all of it in little, and nothing
    where pixels are known.
    """
    arrays = random_batch(residual_stage, 4)
    inputs: list[np.ndarray] = []

    def network(x_B7HW: Tensor, *conditioning: Tensor | None) -> Tensor:
        inputs.append(x_B7HW.asnumpy())
        return x_B7HW[:, :3]

    named = {key: Tensor(array) for key, array in arrays.items()}
    logsnr_B = Tensor(np.full(4, level, np.float32))
    z = add_noise(named["x"], named["eps"], logsnr_B)
    residual_stage.predict(network, z, logsnr_B, named)
    x, prior_mean, mask, task = (arrays[name] for name in ("x", "source", "mask", "task"))
    (image,) = inputs
    np.testing.assert_array_equal(image[:, 3:], np.concatenate((prior_mean, mask), 1))
    assert not image[:, :3][np.broadcast_to(mask, x.shape) == 0].any()
    if level:
        stds = (task @ (0.1, 0.2)).reshape(4, 1, 1, 1)
        expected = mask * (x - prior_mean) / stds * (level > 0)
        np.testing.assert_allclose(image[:, :3], expected, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tasks": {"painting": {}}},
            f"tasks.painting: no such task; there are {', '.join(TASKS)}",
        ),
        ({"tasks": {}}, f"tasks: empty; name some of {', '.join(TASKS)}"),
        (
            {"tasks": {"inpainting": {"weight": 0}}},
            "tasks.inpainting.weight: 0.0 is not positive; leave out a task",
        ),
        (
            {"tasks": {"inpainting": {"residual_std": 0.0}}},
            "tasks.inpainting.residual_std: 0.0 is not positive; leave it out for a",
        ),
        (
            {"tasks": {"inpainting": {"residual_std": 0.1}, "colorization": {}}},
            "tasks.colorization.residual_std: missing, and other tasks have one; give each "
            "task one or none",
        ),
        (
            {"tasks": {"inpainting": {"residual_std": 0.1}}},
            "diffusion.prediction: v, and tasks have a residual_std; give x0",
        ),
        (
            {"conditioning": "class", "classes": {"names": 3}},
            "conditioning: class, but image to image is conditioned on its task",
        ),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(Path("run"), Path("shards"), **changes)
    assert str(error.value).startswith(message)
