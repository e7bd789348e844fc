"""`roadseg sweep`: what is refused before anything runs, what the table says, what a stop leaves."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from roadseg.cli.main import COMMANDS, Command, main
from roadseg.cli.sweep import sweep, sweep_arguments
from roadseg.config.sections import Config, load_config
from roadseg.errors import ConfigError, DataError, Interrupted, NonFiniteLoss, StoreError, UsageError
from roadseg.files import lock, read_json, write_json
from roadseg.pipeline.context import Context
from roadseg.pipeline.run import RunResult
from roadseg.pipeline.workspace import Output, leftovers
from roadseg.sweep import preflight
from roadseg.sweep import table as sweep_table
from roadseg.sweep.plan import parse_seeds, parse_vary, plan_of, settings_of
from roadseg.sweep.record import described
from roadseg.sweep.table import Result, Spread, paired, rows, spread, student_t
from roadseg.train.inputs import Inputs
from tests.conftest import MICRO, Micro, write_release
from tests.html_page import assert_accessible, assert_inert


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "sweep", Command("runs", sweep, sweep_arguments))


# ---- what is asked for ----------------------------------------------------------------------


def test_values_are_yaml() -> None:
    assert parse_vary("training.learning-rate=0.001,2") == ("training.learning_rate", [0.001, 2])
    assert parse_vary("model.atrous_rates=[3, 6, 9],[1,2,3]")[1] == [[3, 6, 9], [1, 2, 3]]
    assert parse_vary("training.steps=null,5")[1] == [None, 5]
    assert parse_vary("training.loss={ohem: 1, dice: 0.5}")[1] == [{"ohem": 1, "dice": 0.5}]


@pytest.mark.parametrize(
    "text",
    [
        "training.steps",
        "=3",
        "training..steps=3",
        "training.steps=",
        "training.seed=1,2",
        "training={seed: 3},{seed: 4}",
    ],
)
def test_what_is_no_key_with_values_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--vary"):
        parse_vary(text)


def test_seeds_are_a_count_or_a_list() -> None:
    assert parse_seeds("3", 5) == (5, 6, 7)
    assert parse_seeds("4,0", 5) == (4, 0)
    assert parse_seeds("4,", 5) == (4,)
    for wrong in ("0", "-1", "a", "1,1", ",", "2.5"):
        with pytest.raises(UsageError, match="--seeds"):
            parse_seeds(wrong, 0)


def test_a_grid_or_one_factor_at_a_time() -> None:
    varied: dict[str, list[Any]] = {"training.momentum": [0.5, 0.6], "model.fusion": ["concat", "dense"]}
    grid = settings_of(varied, one_factor=False)
    assert len(grid) == 4 and grid[1].label == "training.momentum=0.5, model.fusion=dense"
    assert grid[1].values == {"training.momentum": 0.5, "model.fusion": "dense"}
    single = settings_of(varied, one_factor=True)
    assert [s.label for s in single][:2] == ["base", "training.momentum=0.5"] and len(single) == 5
    assert all(len(s.values) == 1 for s in single[1:])


def test_the_plan_of_a_sweep() -> None:
    base = load_config(MICRO)
    plan = plan_of("s", base, ["training.learning_rate=0.001,2e-3,0.002", "model.atrous_rates=[2,3,4]"], "2", True)
    # The base's own rate is the base; it is given in two spellings.
    assert [s.label for s in plan.settings] == ["base", "training.learning_rate=0.001", "model.atrous_rates=[2, 3, 4]"]
    assert [(p.name, p.setting, p.seed) for p in plan.points[:4]] == [
        ("s-001", "base", 0),
        ("s-002", "training.learning_rate=0.001", 0),
        ("s-003", "model.atrous_rates=[2, 3, 4]", 0),
        ("s-004", "base", 1),
    ]
    assert plan.points[0].config == base and plan.points[2].config.model.atrous_rates == (2, 3, 4)
    changed = {k for k, v in plan.points[3].config.training if v != getattr(base.training, k)}
    assert changed == {"seed"} and plan.points[3].config.training.seed == 1


def test_a_grid_without_the_base_is_compared_with_its_first() -> None:
    base = load_config(MICRO)
    lacks = plan_of("s", base, ["training.learning_rate=0.1,0.2"], "", False)
    assert lacks.base == "training.learning_rate=0.1" and not lacks.base_is_config
    assert "base is training.learning_rate=0.1, the first setting: the config's own values are not among" in described(
        lacks, "train"
    )
    has = plan_of("s", base, ["training.learning_rate=0.1,0.002"], "", False)
    assert has.base == "training.learning_rate=0.002" and has.base_is_config
    assert "base is training.learning_rate=0.002: the config's own values." in described(has, "train")
    assert plan_of("s", base, [], "3", False).base == "base"


def test_values_of_a_section_are_laid_over_its_others() -> None:
    plan = plan_of("s", load_config(MICRO), ["training.loss={ohem: 1}"], "", True)
    loss = plan.points[1].config.training.loss
    assert (loss.ohem, loss.cross_entropy) == (1, 1)


@pytest.mark.usefixtures("quiet_log")
def test_everything_wrong_is_listed_at_once_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [
        "training.learning_rat=1,2",
        "model.fusion=concat,skfuson",
        "trainin.steps=1",
        "training.steps",
        "--seeds=x",
    ]
    wrong += ["training.epochs=3", "data.town=[,", "model.fusion=dense", "learning_rate=0.01,0.02"]
    arguments = [part for w in wrong for part in (["--vary", w] if w[0] != "-" else [w])]
    assert main(["sweep", "--config", str(MICRO), "--workspace", str(tmp_path / "w"), *arguments]) == 2
    err = capsys.readouterr().err
    assert "training.learning_rat: unknown key; perhaps you meant learning_rate" in err
    assert "trainin: unknown key; perhaps you meant training" in err
    assert "  learning_rate: unknown key; perhaps you meant training.learning_rate" in err
    assert "model.fusion: input should be" in err and "(found 'skfuson')" in err
    assert "epochs (3) and steps (6) are both set" in err
    assert "--vary: 'training.steps'; expected KEY=VALUE" in err and "--seeds: 'x'" in err
    assert "--vary data.town=[,: not readable as YAML" in err and "model.fusion again" in err
    assert "9 wrong values in the sweep" in err and not (tmp_path / "w").exists()


@pytest.mark.usefixtures("quiet_log")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to vary"),
        (["--seeds", "65"], "1 setting with 65 seeds are 65 runs; expected at most 64"),
        (["--seeds", "2", "--by", "holdout"], "expected a split that is scored: val"),
        (["--seeds", "2", "--name", "../x"], "'../x-001'"),
    ],
)
def test_what_can_t_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["sweep", "--config", str(MICRO), "--workspace", str(tmp_path / "w"), *arguments]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "w").exists()


@pytest.mark.usefixtures("quiet_log")
def test_seeds_that_no_config_may_have_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_it = ["sweep", "--config", str(MICRO), "--workspace", str(tmp_path / "w")]
    wrong = ("-1", "4294967296")
    assert main([*sweep_it, "--seeds=0,-1,4294967296", "--vary", "training.steps=x"]) == 2
    err = capsys.readouterr().err
    assert "3 wrong values in the sweep" in err
    for seed in wrong:
        with pytest.raises(ConfigError) as caught:
            load_config(MICRO, {"training": {"seed": int(seed)}})
        own = str(caught.value).splitlines()[1].strip()
        assert own.startswith("training.seed: ") and f"  --seeds: {own}\n" in err
    assert main([*sweep_it, "--seeds", "2", "--training.seed", "4294967295"]) == 2  # counted on from the last there is
    assert "--seeds: training.seed: " in capsys.readouterr().err and not (tmp_path / "w").exists()


# ---- statistics -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "t"),  # the usual printed tables, two-sided 95 %
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (121, 1.980)],
)
def test_student_t(degrees: int, t: float) -> None:
    assert student_t(degrees) == pytest.approx(t, abs=6e-4)


def test_student_t_at_99_percent() -> None:
    assert [student_t(d, 0.99) for d in (1, 2, 7)] == pytest.approx([63.657, 9.925, 3.499], abs=6e-4)


def test_spread_by_hand() -> None:
    assert spread([0.4, None, 0.5, 0.6]) == Spread(pytest.approx(0.5), pytest.approx(0.1), 0.4, 0.6, 3)
    assert spread([0.4]) == Spread(0.4, None, 0.4, 0.4, 1)
    assert spread([None]) is None


def test_a_paired_interval_by_hand() -> None:
    # Gains 0.01, 0.02, 0.03: mean 0.02, deviation 0.01, half width 4.3027 * 0.01 / sqrt(3) = 0.024841.
    found = paired({0: 0.51, 1: 0.42, 2: 0.63, 9: 0.1}, {0: 0.50, 1: 0.40, 2: 0.60, 8: 0.9})
    assert found and (found.mean, found.low, found.high, found.n) == pytest.approx(
        (0.02, -0.004841, 0.044841, 3), abs=1e-6
    )
    single = paired({0: 0.5}, {0: 0.4})
    assert single and (single.low, single.high, single.n) == (None, None, 1)
    assert paired({0: 0.5}, {1: 0.4}) is None


def gave(setting: str, seed: int, miou: float, **rest: Any) -> Result:
    rest = {"train_key": f"{setting}{seed}", "fingerprints": {"val": "f"}, **rest}
    return Result(f"s-{setting}-{seed}", setting, seed, miou={"val": miou}, **rest)


def test_rows_are_sorted_and_judged() -> None:
    base = [gave("base", s, 0.5 + 0.01 * s, class_iou={"val": {"road": 0.9, "pole": 0.1, "sky": None}}) for s in (0, 1)]
    up = [
        gave("up", s, 0.6 + 0.01 * s, class_iou={"val": {"road": 0.8, "pole": 0.4, "sky": None, "car": 0.2}})
        for s in (0, 1)
    ]
    down = [gave("down", s, 0.4 + 0.0101 * s) for s in (0, 1)]
    unclear = [gave("unclear", s, 0.52 - 0.03 * s) for s in (0, 1)]
    same = [gave("same", s, 0.5 + 0.01 * s, train_key=f"base{s}") for s in (0, 1)]
    other = [gave("other", 0, 0.9, fingerprints={"val": "g"})]
    lone, failed = (
        [gave("lone", 0, 0.45)],
        [Result("s-x", "x", 0, error="loss nan"), Result("s-x", "x", 1, error="nan")],
    )
    table = rows([*failed, *base, *up, *down, *unclear, *same, *other, *lone], "base", "val")
    assert {row.setting: row.verdict for row in table} == {
        "other": "other data",
        "up": "better",
        "base": "base",
        "same": "the same training",
        "unclear": "too small to tell",
        "lone": "one seed: no interval",
        "down": "worse",
        "x": "failed",
    }
    mious = [row.miou["val"].mean for row in table if row.miou]
    assert mious == sorted(mious, reverse=True) and table[-1].setting == "x"
    found = {row.setting: row for row in table}
    assert [name for name, _ in found["up"].moved] == ["pole", "road"]
    assert dict(found["up"].moved) == pytest.approx({"pole": 0.3, "road": -0.1})
    assert found["up"].difference["val"].mean == pytest.approx(0.1) and not found["other"].difference
    assert not found["base"].difference and len(found["x"].runs) == 2


def test_the_page_is_inert_and_the_table_whole() -> None:
    results = [gave("base", s, 0.5 + 0.011 * s) for s in (0, 1)] + [gave("a|<b>", s, 0.6 + 0.01 * s) for s in (0, 1)]
    results += [Result("s-9", "<script>", 0, error="loss nan | at\nstep 3")]
    table = rows(results, "base", "val")
    html = sweep_table.page("<t>", table, "val", "Scores of a test.", "1 of 6 runs are still to come.")
    page = assert_inert(html)
    assert_accessible(page)
    assert "better" in page.text and "loss nan" in page.text and "still to come" in page.text
    text = sweep_table.markdown("t", table, "val", "Scores of a test.")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 and {line.replace("\\|", "").count("|") for line in lines} == {8}
    assert "a\\|<b>" in lines[2] and "60.50 ± 0.71 (60.0 to 61.0, n 2)" in lines[2] and "+9.95" in lines[2]
    assert "- s-9 (<script>, seed 0): loss nan \\| at step 3" in text


def test_what_moved_most_is_a_column_only_where_something_did() -> None:
    def heads(**rest: Any) -> tuple[list[str], list[str]]:
        results = [gave(name, 0, miou, **rest) for name, miou in (("base", 0.5), ("x", 0.6))]
        table = rows(results, "base", "val")
        text, html = sweep_table.markdown("t", table, "val", ""), sweep_table.page("t", table, "val", "")
        lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
        cells = [row.count("<td") for row in html.partition("</section>")[0].split("<tr>")[2:]]
        assert {len(line) for line in lines} == {len(lines[0])} and set(cells) == {len(lines[0])}
        return [head.strip() for head in lines[0]], re.findall(r'<th scope="col"[^>]*>([^<]*)', html)

    for shown in heads(class_iou={"val": {"road": 0.9, "pole": 0.1}}):
        assert "moved most" in shown
    for shown in heads():  # training alone tells no classes
        assert "moved most" not in shown and shown[2:4] == ["to the base on val (points)", "verdict"]


@pytest.mark.parametrize(("miou", "kind"), [((0.6, 0.61), "bars"), ((0.52, 0.49), "bars unclear")])
def test_a_bar_has_a_colour_where_there_is_a_verdict(miou: tuple[float, float], kind: str) -> None:
    results = [gave("base", s, 0.5 + 0.011 * s) for s in (0, 1)] + [gave("x", s, miou[s]) for s in (0, 1)]
    html = sweep_table.page("t", rows(results, "base", "val"), "val", "")
    assert html.count(f'<td class="{kind}"><svg') == 1 and html.count("><svg") == 1
    assert ".sweep .unclear rect { fill: var(--muted); }" in html


# ---- running --------------------------------------------------------------------------------


class Cheap:
    """`roadseg.pipeline.run.run` without training: the learning rate is the score, `fails` what some end with."""

    def __init__(self, workspace: Path, fails: Callable[[Config], Exception | None]) -> None:
        self.archive, self.fails, self.calls = write_release(workspace / "model.tar.gz"), fails, 0

    def __call__(self, config: Config, until: str, *, workspace: Path, name: str, wait: bool) -> RunResult:
        self.calls += 1
        if error := self.fails(config):
            raise error
        key = f"{config.training.learning_rate}-{config.training.seed}"
        folder = workspace / "stages" / "train" / key
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.archive, folder / "model.tar.gz")
        write_json(folder / "stage.json", {"seconds": 2.5})
        (folder / "history.jsonl").write_text(
            '{"step": 1, "split": "val", "miou": 0.1}\n{"step": 2, "loss": 1}\n'
            f'{{"step": 2, "split": "val", "miou": {config.training.learning_rate + 0.01 * config.training.seed}}}\n'
        )
        return RunResult({"train": Output("train", key, "c", folder, False)}, workspace / "runs" / name)


def sweep_(workspace: Path, *arguments: str) -> int:
    common = [
        "--config",
        str(MICRO),
        "--workspace",
        str(workspace),
        "--until",
        "train",
        "--training.learning-rate",
        "0.3",
    ]
    return main(["sweep", *common, *arguments])


@pytest.mark.usefixtures("quiet_log")
def test_one_that_fails_is_recorded_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(config: Config) -> Exception | None:
        return NonFiniteLoss("loss nan at step 2") if config.training.learning_rate == 0.5 else None

    monkeypatch.setattr("roadseg.sweep.run.run", Cheap(tmp_path, fails))
    vary = ["--vary", "training.learning_rate=0.3,0.5,0.4", "--seeds", "2"]
    assert sweep_(tmp_path, *vary) == 1
    out = capsys.readouterr().out
    assert "[2/6] sweep-002 training.learning_rate=0.5, seed 0: val mIoU failed" in out
    assert "- sweep-005 (training.learning_rate=0.5, seed 1): loss nan at step 2" in out
    record = read_json(tmp_path / "sweeps" / "sweep" / "sweep.json")
    assert [row["setting"].partition("=")[2] for row in record["rows"]] == ["0.4", "0.3", "0.5"]
    best = record["rows"][0]
    assert best["verdict"] == "better" and best["miou"]["val"]["n"] == 2
    assert best["miou"]["val"]["mean"] == pytest.approx(0.405) and best["train_seconds"]["mean"] == 2.5
    assert record["base"] == "training.learning_rate=0.3" and record["runs_to_come"] == 0
    assert {p.name for p in (tmp_path / "sweeps").iterdir()} == {"sweep"}  # no lock is left
    assert_inert((tmp_path / "sweeps" / "sweep" / "sweep.html").read_text())


@pytest.mark.usefixtures("quiet_log")
def test_settings_that_can_not_be_trained_are_told_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cheap, looked, ahead = Cheap(tmp_path, lambda config: None), [], preflight.refuse_impossible  # type: ignore[attr-defined]
    monkeypatch.setattr("roadseg.sweep.run.run", cheap)

    def look(context: Context, inputs: Inputs) -> None:
        looked.append(context.config)
        ahead(context, inputs)

    monkeypatch.setattr(preflight, "refuse_impossible", look)
    vary = ["--vary", "training.batch_size=1,2", "--vary", "model.channels=8,16", "--vary", "data.town.seed=1,2"]
    vary += ["--vary", "model.low_levels=[4],[3]", "--seeds", "2"]
    assert sweep_(tmp_path, *vary) == 2 and cheap.calls == 0 and not (tmp_path / "sweeps" / "sweep").exists()
    assert len(looked) == 8  # the data changes nothing of it, nor a seed
    err = capsys.readouterr().err
    assert (
        "12 of 16 settings can't be trained:\n  training.batch_size=1, model.channels=8, data.town.seed=1, model" in err
    )
    both = (
        "  training.batch_size=1, model.channels=16, data.town.seed=2, model.low_levels=[4]:\n    training.batch_size: "
    )
    assert f"{both}batch norm would take its statistics from one image" in err and "1 thing" not in err
    assert err.count("batch norm would take") == 1 and err.count("no map at stride 3") == 1
    assert sweep_(tmp_path, "--vary", "training.batch_size=2,4") == 0 and cheap.calls == 2


@pytest.mark.usefixtures("quiet_log")
def test_a_release_to_start_from_is_looked_for_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cheap = Cheap(tmp_path, lambda config: None)
    monkeypatch.setattr("roadseg.sweep.run.run", cheap)
    assert sweep_(tmp_path, "--vary", "training.init_from='',0123456789ab") == 2 and cheap.calls == 0
    told = "1 of 2 settings can't be trained:\n  training.init_from=0123456789ab:\n    training.init_from: "
    assert told in capsys.readouterr().err

    def unreachable(context: Context) -> None:
        raise StoreError("no answer", where="s3://models")

    monkeypatch.setattr(preflight, "training_inputs", unreachable)
    assert sweep_(tmp_path, "--vary", "training.learning_rate=0.1") == 2 and cheap.calls == 0
    assert "1 of 1 setting can't be trained" in (err := capsys.readouterr().err) and "s3://models: no answer" in err


@pytest.mark.usefixtures("quiet_log")
def test_what_was_trained_elsewhere_needs_no_gpu_here(
    micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under whatever name."""
    shutil.copytree(micro.workspace / "stages", tmp_path / "stages")

    def refuse_gpu(context: Context, inputs: Inputs) -> None:
        raise ConfigError("cuda, and there is none", where="training.device")

    monkeypatch.setattr(preflight, "refuse_impossible", refuse_gpu)
    rate = micro.config.training.learning_rate
    asked = ["sweep", "--config", str(MICRO), "--workspace", str(tmp_path), "--until", "train", "--vary"]
    assert main([*asked, f"training.learning_rate={rate}"]) == 0
    for others in (["0.5", "--name", "b"], ["0.5", "--name", "c", "--data.town.seed", "9"]):
        capsys.readouterr()
        assert main([*asked, f"training.learning_rate={rate},{others[0]}", *others[1:]]) == 2
        told = "1 of 2 settings" if others[-1] == "b" else "2 of 2 settings"
        assert (
            told in (err := capsys.readouterr().err)
            and "  training.learning_rate=0.5:\n    training.device: cuda" in err
        )


@pytest.mark.usefixtures("quiet_log")
def test_data_that_all_share_is_refused_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap = Cheap(tmp_path, lambda config: DataError("no pairs") if config.data.town.train < 9 else None)
    monkeypatch.setattr("roadseg.sweep.run.run", cheap)
    assert sweep_(tmp_path, "--seeds", "3") == 3 and cheap.calls == 1
    assert sweep_(tmp_path, "--vary", "data.town.train=8,9", "--name", "own") == 1 and cheap.calls == 3


@pytest.mark.usefixtures("quiet_log")
def test_a_split_without_scores_is_said_after_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap = Cheap(tmp_path, lambda config: None)
    monkeypatch.setattr("roadseg.sweep.run.run", cheap)
    assert sweep_(tmp_path, "--seeds", "3", "--by", "test") == 2 and cheap.calls == 1


@pytest.mark.usefixtures("quiet_log")
def test_another_sweep_of_the_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cheap = Cheap(tmp_path, lambda config: None)
    monkeypatch.setattr("roadseg.sweep.run.run", cheap)
    asked = ["--vary", "training.learning_rate=0.4,0.5"]
    assert sweep_(tmp_path, *asked) == 0 and cheap.calls == 2
    folder = tmp_path / "sweeps" / "sweep"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    html = before["sweep.html"].decode()
    assert "2 settings, 1 seed<" in html and "WORKSPACE/runs" not in html and "not among them" in html
    capsys.readouterr()
    for other, said in (
        (["--vary", "training.learning_rate=0.4,0.6"], "other settings;"),
        ([*asked, "--seeds", "2"], "other seeds;"),
        ([*asked, "--until", "evaluate"], "other until;"),
        ([*asked, "--training.momentum", "0.5"], "other training.momentum;"),
    ):
        assert sweep_(tmp_path, *other) == 2 and cheap.calls == 2
        err = capsys.readouterr().err
        assert said in err and "pass another --name" in err and str(folder) in err
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert sweep_(tmp_path, *asked) == 0 and sweep_(tmp_path, *asked, "--seeds", "2", "--name", "more") == 0


@pytest.mark.usefixtures("quiet_log")
def test_several_processes_are_refused_before_they_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert sweep_(tmp_path, "--seeds", "2") == 2
    err = capsys.readouterr().err
    assert "2 processes were started" in err and "--training.gpus N" in err
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.usefixtures("quiet_log")
def test_a_second_sweep_of_the_name_is_refused_without_waiting(tmp_path: Path) -> None:
    with lock(tmp_path / "sweeps" / "sweep.lock", "", wait=True):
        assert sweep_(tmp_path, "--seeds", "2", "--no-wait") == 5


@pytest.mark.usefixtures("quiet_log")
@pytest.mark.parametrize("how", ["in training", "SIGTERM", "Ctrl-C"])
def test_a_stop_ends_it_at_once_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    stops = [True]

    def stop(config: Config) -> Exception | None:
        if config.training.seed == 0 or not stops:
            return None
        stops.clear()
        if how == "in training":  # the loop handles the signal, saves, and raises this
            return Interrupted("stopped by SIGTERM after step 1; run again to go on", signal_number=signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM if how == "SIGTERM" else signal.SIGINT)
        raise AssertionError("the signal came too late")

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    cheap, before = Cheap(tmp_path, stop), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("roadseg.sweep.run.run", cheap)
    assert sweep_(tmp_path, "--seeds", "3") == (130 if how == "Ctrl-C" else 143)
    err = capsys.readouterr().err
    assert "1 of 3 runs are done, give the same command again to go on" in err and err.count("again") == 1
    assert signal.getsignal(signal.SIGTERM) is before and cheap.calls == 2
    assert "2 of 3 runs are still to come" in (tmp_path / "sweeps" / "sweep" / "sweep.md").read_text()
    assert sweep_(tmp_path, "--seeds", "3") == 0 and cheap.calls == 5
    assert read_json(tmp_path / "sweeps" / "sweep" / "sweep.json")["runs_to_come"] == 0


@pytest.mark.usefixtures("quiet_log")
def test_the_whole_way_on_two_settings(micro: Micro, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = Path(shutil.copytree(micro.workspace, tmp_path / "w"))
    store = {p: p.read_bytes() for p in (workspace / "store").rglob("*") if p.is_file()}
    arguments = ["sweep", "--config", str(MICRO), "--workspace", str(workspace)]
    arguments += ["--vary", "training.learning_rate=0.01", "--vary", "training.steps=6", "--one-factor"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "[1/2] sweep-001 base, seed 0" in out and "[2/2] sweep-002 training.learning_rate=0.01" in out
    first = read_json(workspace / "runs" / "sweep-001" / "run.json")["outputs"]
    assert {s: o["content"] for s, o in first.items()} == micro.contents and all(o["cached"] for o in first.values())
    second = read_json(workspace / "runs" / "sweep-002" / "run.json")["outputs"]
    assert {s for s, o in second.items() if o["cached"]} == {"ingest", "transform"}
    assert "its report is in WORKSPACE/runs/NAME" in (workspace / "sweeps" / "sweep" / "sweep.html").read_text()
    table = {row["setting"]: row for row in read_json(workspace / "sweeps" / "sweep" / "sweep.json")["rows"]}
    base, other = table["base"], table["training.learning_rate=0.01"]
    assert micro.result.evaluation and base["miou"]["val"]["mean"] == micro.result.evaluation["miou"]
    assert other["verdict"] == "one seed: no interval" and len(other["moved"]) == 3
    present = {name for name, iou in micro.result.evaluation["class_iou"].items() if iou is not None}
    assert set(other["class_iou"]["val"]) == present
    assert other["difference"]["val"]["mean"] == other["miou"]["val"]["mean"] - base["miou"]["val"]["mean"]
    assert base["parameters"] == micro.result.evaluation["model"]["parameters"] and base["train_seconds"]["n"] == 1
    (workspace / "runs" / "first" / "run.json").unlink()  # its outputs are the sweep's too
    assert leftovers(workspace) == []
    assert {p: p.read_bytes() for p in (workspace / "store").rglob("*") if p.is_file()} == store  # nothing is pushed
    made = {p: p.stat().st_mtime_ns for p in (workspace / "stages").rglob("*")}
    assert main(arguments) == 0  # again: nothing is made
    assert {p: p.stat().st_mtime_ns for p in (workspace / "stages").rglob("*")} == made
