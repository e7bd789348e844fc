"""scripts/install with stand-ins on PATH: every way it can't go on is one sentence and exit code 1."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PYTHON = """#!/bin/sh
# A Python that is {version}, for scripts/install alone.
case "$*" in
  --version) echo "Python {version}" ;;
  *version_info*) exit {too_old} ;;
  *ensurepip*) {venv_module} ;;
  "-m venv "*) shift 2; mkdir -p "$1/bin"; cp "$0" "$1/bin/python"; {venv_result} ;;
  "-m pip --version") test -e "$(dirname "$0")/../whole" ;;
  "-m pip install"*) echo "pip $*" >> calls; {pip_result} ;;
  *) echo "not expected: $*" >&2; exit 99 ;;
esac
"""
GOOD = {
    "version": "3.12.1",
    "too_old": "0",
    "venv_module": "exit 0",
    "venv_result": "exit 0",
    "pip_result": "exit 0",
}
DF = "#!/bin/sh\necho Filesystem 1048576-blocks Used Available Capacity Mounted\necho /dev/x 10000 9000 {free} 90% /\n"


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def install(folder: Path, free_mb: int = 50_000, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs a copy of the script in `folder`, where `python3` and `df` are stand-ins and nothing else is."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    shutil.copy(ROOT / "scripts" / "install", folder / "install")
    (folder / "constraints.txt").touch()
    script(tools / "python3", PYTHON.format(**{**GOOD, **changes}))
    script(tools / "df", DF.format(free=free_mb))
    for name in ("sh", "awk", "rm", "mkdir", "cp", "touch", "dirname", "cat"):
        if not (tools / name).exists():
            (tools / name).symlink_to(shutil.which(name) or pytest.fail(f"no {name} here"))
    environment = {"PATH": str(tools)} | {k: v for k, v in os.environ.items() if k.startswith("LC_")}
    return subprocess.run(["sh", "install"], cwd=folder, env=environment, capture_output=True, text=True, timeout=30)


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed installation says."""
    assert done.returncode == 1, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("roadseg: "), done.stderr
    return lines[0]


def test_it_installs_the_pinned_versions_and_says_that_it_is_ready(tmp_path: Path) -> None:
    done = install(tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".venv" / ".ready").exists()
    assert "--constraint constraints.txt" in (tmp_path / "calls").read_text()


def test_python_too_old(tmp_path: Path) -> None:
    said = sentence(install(tmp_path, version="3.9.2", too_old="1"))
    assert "Python 3.9.2 is too old" in said and "3.11 or newer" in said
    assert not (tmp_path / ".venv").exists()


def test_no_python(tmp_path: Path) -> None:
    install(tmp_path)
    shutil.rmtree(tmp_path / ".venv")
    (tmp_path / "tools" / "python3").unlink()
    done = subprocess.run(
        ["sh", "install"], cwd=tmp_path, env={"PATH": str(tmp_path / "tools")}, capture_output=True, text=True
    )
    assert "no 'python3' on the PATH" in sentence(done)


def test_no_venv_module(tmp_path: Path) -> None:
    said = sentence(install(tmp_path, venv_module='echo "No module named ensurepip" >&2; exit 1'))
    assert "no venv module" in said and "python3-venv" in said


def test_no_disk(tmp_path: Path) -> None:
    said = sentence(install(tmp_path, free_mb=700))
    assert "only 700 MB" in said and "about 8000 MB" in said
    assert not (tmp_path / ".venv").exists()


def test_a_venv_that_can_not_be_made(tmp_path: Path) -> None:
    assert "could not be made in .venv" in sentence(install(tmp_path, venv_result="exit 3"))


def test_packages_that_can_not_be_installed_leave_it_not_ready_and_running_again_goes_on(tmp_path: Path) -> None:
    assert "could not be installed" in sentence(install(tmp_path, pip_result="exit 1"))
    assert not (tmp_path / ".venv" / ".ready").exists()
    assert install(tmp_path).returncode == 0


def test_a_whole_environment_is_kept_and_a_broken_one_made_anew(tmp_path: Path) -> None:
    install(tmp_path)
    mark = tmp_path / ".venv" / "mark"
    mark.touch()
    (tmp_path / ".venv" / "whole").touch()
    assert install(tmp_path, free_mb=0).returncode == 0 and mark.exists()  # no room is needed for what is there
    (tmp_path / ".venv" / "whole").unlink()
    assert install(tmp_path).returncode == 0 and not mark.exists()
