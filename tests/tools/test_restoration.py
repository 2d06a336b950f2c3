"""The tool that measures restored pictures: its scores, and a whole run of it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.imaging.contact_sheet import CAPTION_HEIGHT, GAP, MIN_SIDE
from pipeline.imaging.degradations import TASKS
from tests.stages.test_image_to_image import cascade, picture, run  # noqa: F401  (fixtures)
from tools.restoration import before, damage, damages, main, score

RNG = np.random.default_rng(0)


def test_scores_against_their_definitions():
    truth = picture(24, 24)
    noisy = np.clip(truth + RNG.normal(0, 8, truth.shape), 0, 255).astype(np.uint8)
    psnr, ssim = score(noisy, truth)
    error = np.mean((noisy.astype(np.float64) - truth) ** 2)
    assert psnr == pytest.approx(10 * np.log10(255**2 / error))
    assert 0.5 < ssim < 1
    assert score(truth, truth) == (60.0, 1.0)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_known_is_the_truth(task):
    """Where nothing is to be made the degraded picture is the true one; a hole is grey."""
    truth = picture(32, 32)
    case = damage(task, "x", truth, 0, 3)
    known = case.given.mask[0] == 0
    assert (before(case)[known] == truth[known]).all()
    if known.any():
        assert (before(case)[~known] == 128).all()
    again = damage(task, "x", truth, 0, 3)
    assert (again.given.source == case.given.source).all()


def test_inpainting_is_measured_with_holes_in_the_centre_too():
    pictures = [("x", picture(32, 32)), ("y", picture(32, 32))]
    drawn, centre = damages("inpainting", pictures, 0).values()
    assert [case.given.mask.mean() for case in centre] == [0.25, 0.25]
    assert all(case.given.mask[0, 8:24, 8:24].all() for case in centre)
    assert (drawn[0].given.mask != drawn[1].given.mask).any()
    assert list(damages("uncropping", pictures, 0)) == ["uncropping"]


def test_a_whole_run(run, shards_folder: Path, tmp_path: Path, capsys):  # noqa: F811
    out = tmp_path / "out"
    argv = [
        str(run / "stage"),
        "--shards",
        f"{shards_folder}/*.tar",
        "--out",
        str(out),
        "--num",
        "2",
        "--samples",
        "2",
    ]
    main(argv)
    lines = capsys.readouterr().out.splitlines()
    inpainting, centre, colorization = (line.split(" | ") for line in lines[2:5])
    assert (inpainting[0], centre[0], colorization[0]) == (
        "| inpainting",
        "| inpainting_centre",
        "| colorization",
    )
    assert len({cell.split()[0] for cell in inpainting}) == 6
    assert colorization[1] == colorization[2] == colorization[3]  # all grey
    assert lines[5].startswith("PSNR in dB (SSIM), means of 2 pictures; 2 samples of each")
    with Image.open(out / "overview.png") as image:
        assert image.height == GAP + 3 * (MIN_SIDE + GAP + CAPTION_HEIGHT)
    assert len((out / "inpainting" / "manifest.jsonl").read_text().splitlines()) == 2 * 4
    main(argv)  # nothing is made again
    assert capsys.readouterr().out.splitlines() == lines
    main([*argv, "--train", f"{shards_folder}/*.tar"])
    again = capsys.readouterr().out.splitlines()
    assert again[2:4] == lines[2:4]
    assert [
        cell
        for cell, before in zip(again[4].split(" | "), colorization, strict=True)
        if cell != before
    ] == [
        again[4].split(" | ")[2]  # the baseline has a colour now
    ]


def test_other_stages_are_refused(trained: Path, tmp_path: Path):
    with pytest.raises(UserError, match="not an image-to-image stage"):
        main([str(trained / "cascade"), "--shards", "x.tar", "--out", str(tmp_path)])


def test_a_task_that_two_stages_know_is_refused(run, tmp_path: Path):  # noqa: F811
    with pytest.raises(
        UserError, match=r"knows inpainting, and .*stage does too; measure one after the other"
    ):
        main([str(run / "stage"), str(run / "stage"), "--shards", "x.tar", "--out", str(tmp_path)])
