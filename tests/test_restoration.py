"""The tool that measures restored pictures: its scores, and a whole run of it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.tasks import TASKS
from pipeline.errors import UserError
from tests.test_image_to_image import cascade, picture, run  # noqa: F401  (fixtures)
from tools.restoration import before, damage, main, overview, score

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
    """Where nothing is to be made the damaged picture is the true one; a hole is grey."""
    truth = picture(32, 32)
    case = damage(task, "x", truth, 0, 3)
    known = case.given.mask[0] == 0
    assert (before(case)[known] == truth[known]).all()
    if known.any():
        assert (before(case)[~known] == 128).all()
    again = damage(task, "x", truth, 0, 3)
    assert (again.given.source == case.given.source).all()


def test_an_overview_has_a_row_a_task():
    rows = [[np.full((8, 8, 3), 10 * i + j, np.uint8) for j in range(3)] for i in range(2)]
    sheet = np.asarray(overview(rows))
    assert sheet.shape == (20, 32, 3)
    assert (sheet[12:20, 24:32] == 12).all()
    assert (sheet[:, 8:12] == 255).all()


def test_a_whole_run(run, shards_folder: Path, tmp_path: Path, capsys):  # noqa: F811
    out = tmp_path / "out"
    argv = [str(run / "stage"), f"{shards_folder}/*.tar", "--out", str(out), "--num", "2", "--samples", "2"]
    main(argv)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| inpainting", "| colorization"]
    assert lines[4].startswith("PSNR in dB (SSIM), means of 2 pictures; 2 samples of each")
    with Image.open(out / "overview.png") as image:
        assert image.size == (5 * 20 - 4, 2 * 20 - 4)
    assert len((out / "inpainting" / "manifest.jsonl").read_text().splitlines()) == 2 * 4
    main(argv)  # nothing is made again
    assert capsys.readouterr().out.splitlines() == lines


def test_other_stages_are_refused(trained: Path, tmp_path: Path):
    with pytest.raises(UserError, match="not an image-to-image stage"):
        main([str(trained / "cascade"), "x.tar", "--out", str(tmp_path)])
