"""What every command does: errors of one line, the exit code, closed streams."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common import cli
from gpt import sample

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--top_q=1"], "unknown flag --top_q; did you mean --top_p?"),
        (["--xyzzy=1"], "unknown flag --xyzzy; --help lists"),
        (["--seed"], "Missing value for argument '--seed'"),
        (["--seed=x"], "--seed: invalid literal for int()"),
        (["--top_p=0"], "top_p=0.0: must be more than 0"),
        (["--temperature=nan"], "temperature=nan: must be finite"),
        (["--out_dir="], "out_dir='': must not be empty"),
        (["stray"], "stray"),
        (["--seed=" + "9" * 50], "must fit 64 bits"),
        (["--seed", "-1"], "seed=-1: must be at least 0"),
        (["-x"], "-x"),
        (["--"], "unknown flag --;"),
        (["--out_dir=a\nb"], "a b does not exist"),
        (["--out_dir=a\x1b[2Jb"], r"a\x1b[2Jb does not exist"),
    ],
)
def test_a_wrong_command_line_is_one_line(flags, says, capsys):
    """tyro prints a box of several lines, and a name may contain line ends and escapes."""
    assert sample.main(["--device=cpu", *flags]) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("error: ") and err.count("\n") == 1


def test_an_empty_path_is_not_this_folder(capsys, tmp_path, monkeypatch):
    """--out= wrote a data set into the current folder."""
    from data.shakespeare_char import prepare

    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("to be")
    for flags in (["--out="], ["--out", ""], ["--input="]):
        assert cli.run(prepare.main, argv=["--input=in.txt", *flags]) == 2
        assert "= is empty; name a file or a folder" in capsys.readouterr().err
    assert os.listdir() == ["in.txt"]


def test_help_is_printed_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main(["--help"])
    assert not stop.value.code and "--temperature FLOAT" in capsys.readouterr().out


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**60, dtype=torch.uint8),
        lambda: np.empty(2**60, np.uint8),
        lambda: torch.empty(2**62, 2**62),
        lambda: bytearray(2**60),
    ],
)
def test_out_of_memory_is_one_line(allocate, capsys):
    """torch raises RuntimeError, numpy and Python MemoryError: both were tracebacks."""
    assert cli.exit_code(allocate) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory (") and "smaller" in err and err.count("\n") == 1


def test_other_runtime_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="must match the size"):
        cli.exit_code(lambda: torch.zeros(2) + torch.zeros(3))


def test_ctrl_c_is_130_and_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert cli.exit_code(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"


# -- closed streams and broken pipes ------------------------------------------------------

OPENS = """
import os, sys
from common import cli
def work():
    with open("made", "w") as file:
        os.write(2, b"from C")  # as a C library prints
        file.write(str(file.fileno()))
    print("out")
    raise ValueError("wrong")
sys.exit(cli.exit_code(work))
"""


def shell(command, cwd, code=OPENS):
    """Run `code` with a buffered stdout, so that some text is left to write at the end."""
    (cwd / "code.py").write_text(code)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["/bin/bash", "-c", f"{sys.executable} code.py {command}"],
        cwd=cwd, env=env, capture_output=True, text=True, timeout=60,
    )


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-", "1>&- 2>&-"])
def test_no_file_takes_the_number_of_a_closed_stream(closed, tmp_path):
    """With stderr closed, the next file got the number 2, and a C library printed into it."""
    done = shell(closed, tmp_path)
    assert done.returncode == 2
    assert (tmp_path / "made").read_text() not in ("0", "1", "2")
    stdout = "" if "1>" in closed else "out\n"
    if "2>" in closed and "1>" not in closed:
        stdout += "error: wrong\n"
    assert done.stdout == stdout
    assert done.stderr == ("" if "2>" in closed else "from Cerror: wrong\n")


PRINTS = """
import sys
from common import cli
sys.exit(cli.exit_code(lambda: [print("line", i) for i in range(int(sys.argv[1]))]))
"""


@pytest.mark.parametrize("lines", [10, 100_000])  # written at the end; while it runs
@pytest.mark.parametrize("reader", ["| head -1", "| true", "2>&1 | head -1"])
def test_a_broken_pipe_ends_a_command_quietly(reader, lines, tmp_path):
    done = shell(f"{lines} {reader}; exit ${{PIPESTATUS[0]}}", tmp_path, PRINTS)
    assert done.returncode in (0, 2)  # 0 if the few lines were written before the reader ended
    assert lines == 10 or done.returncode == 2
    assert done.stderr == "" and done.stdout in ("", "line 0\n")


@pytest.mark.parametrize("lines", [10, 100_000])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_a_full_disk_behind_stdout_is_one_line(lines, tmp_path):
    done = shell(f"{lines} > /dev/full", tmp_path, PRINTS)
    assert done.returncode == 2 and done.stderr == "error: [Errno 28] No space left on device\n"
