"""What all commands share: exit codes and one-line errors."""

import argparse
from collections.abc import Callable, Sequence

import pytest

from pipeline.errors import JobError, UserError
from pipeline.terminal import positive, positive_number, run


def exit_code(main: Callable[[Sequence[str]], int | None]) -> object:
    with pytest.raises(SystemExit) as end:
        run(main, ["word"])
    return end.value.code


def raising(error: BaseException) -> Callable[[Sequence[str]], int]:
    def main(argv: Sequence[str]) -> int:
        raise error

    return main


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (75, 75)])
def test_the_result_of_main_is_the_exit_code(result: int | None, code: int) -> None:
    assert exit_code(lambda argv: result) == code


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("a.yaml: no such file"), 2, "a.yaml: no such file\n"),
        (JobError("the server is away"), 1, "the server is away\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_expected_errors_are_one_line(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(raising(error)) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", message)


def test_a_bug_keeps_its_traceback() -> None:
    """Python then prints it and exits with code 1."""
    with pytest.raises(ZeroDivisionError, match="the job"):
        run(raising(ZeroDivisionError("the job")), [])


def test_numbers_of_arguments() -> None:
    assert positive("3") == 3
    assert positive_number("0.5") == 0.5
    for text in ("0", "-1", "inf", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"not a number above 0"):
            positive_number(text)
    with pytest.raises(argparse.ArgumentTypeError, match="0 is less than 1"):
        positive("0")
