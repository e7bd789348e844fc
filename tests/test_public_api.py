"""What `import roadseg` promises to other programs."""

import subprocess
import sys
from pathlib import Path

import pytest

import roadseg

NAMES = {"Config", "Predictor", "RunResult", "evaluate_release", "load_config", "load_release", "predict", "run"}


def test_every_promised_name_is_there_and_is_its_module_s() -> None:
    from roadseg.config import sections as config
    from roadseg.inference import predict, predictor
    from roadseg.pipeline import run as pipeline
    from roadseg.release import archive

    assert set(roadseg.__all__) == NAMES and set(dir(roadseg)) >= NAMES | {"__version__"}
    assert roadseg.run is pipeline.run and roadseg.evaluate_release is pipeline.evaluate_release
    assert roadseg.RunResult is pipeline.RunResult and roadseg.load_release is archive.load_release
    assert roadseg.Config is config.Config and roadseg.load_config is config.load_config
    assert roadseg.Predictor is predictor.Predictor and roadseg.predict is predict.predict


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'roadseg' has no attribute 'runn'"):
        roadseg.runn  # type: ignore[attr-defined]  # noqa: B018


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, roadseg; roadseg.__version__; print(*sys.modules)"
    found = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert "roadseg" in found
    assert not found & {"torch", "cv2", "onnxruntime", "numpy", "pydantic", "roadseg.config.sections"}


def test_it_is_typed(tmp_path: Path) -> None:
    """mypy sees the real signatures, and a wrong name."""
    source = tmp_path / "use.py"
    source.write_text(
        "import roadseg\n"
        "reveal_type(roadseg.load_config)\n"
        "reveal_type(roadseg.run)\n"
        "roadseg.runn\n"
        "roadseg.Predictor(3)\n"
    )
    root = Path(roadseg.__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--config-file", "", "--cache-dir", str(tmp_path / "cache")]
    command += ["--follow-imports=silent", "--ignore-missing-imports", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env={"MYPYPATH": str(root), "PATH": ""})
    for part in (
        "-> roadseg.config.sections.Config",
        "-> roadseg.pipeline.run.RunResult",
        "[attr-defined]",
        "[arg-type]",
    ):
        assert part in done.stdout, done.stdout + done.stderr
