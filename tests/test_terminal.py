"""What commands say: messages as they are, brackets included, and no traceback for what is wrong with the input."""

import warnings

import pytest
import typer

from redknot_cli.terminal import progress, told


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, ImportError])
def test_errors_are_a_line_that_keeps_its_brackets(kind, capsys):
    with pytest.raises(typer.Exit) as left, told():
        raise kind("pip install 'redknot-hf[plot]', [/red] and [bold]")
    assert left.value.exit_code == 2
    assert capsys.readouterr().err.strip() == "error: pip install 'redknot-hf[plot]', [/red] and [bold]"


@pytest.mark.filterwarnings("default")
def test_warnings_are_a_line(capsys):
    with told():
        warnings.warn("kinds [a, b] are left out", stacklevel=1)
    assert capsys.readouterr().err.strip() == "warning: kinds [a, b] are left out"


def test_a_fault_of_our_own_keeps_its_traceback():
    with pytest.raises(KeyError), told():
        raise KeyError("x")


def test_stages_are_reported(capsys):
    with progress() as report:
        report("drift", 1, 2)
        report("drift", 2, 2)
        report("held out", 0, None)
