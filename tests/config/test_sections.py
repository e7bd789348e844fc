import json
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError, field_validator

from roadseg.cli.flags import parse_flags
from roadseg.config.sections import Config, describe, load_config
from roadseg.config.yaml_file import load_yaml
from roadseg.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def wrong(tmp_path: Path, text: str, flags: list[str] = []) -> str:  # noqa: B006
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_flags(path, flags, "roadseg run", "")
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    assert load_config(path).data.source in path.stem


def test_baseline_is_the_reference_recipe() -> None:
    t = load_config(next(p for p in CONFIGS if p.stem == "cityscapes-baseline")).training
    assert (t.epochs, t.batch_size, t.learning_rate, t.optimizer, t.scheduler) == (60, 8, 0.001, "adam", "poly")


def test_errors_of_file_and_flags_are_reported_together_by_path(tmp_path: Path) -> None:
    text = wrong(
        tmp_path,
        "training: {epochs: many, batch_size: 0, lerning_rate: 3}\nmodel: {fusion: foo}\ndat: 3\n",
        ["--training.learning-rate", "-1"],
    )
    for line in (
        "training.epochs: ",
        "training.batch_size: ",
        "training.lerning_rate: unknown key; perhaps you meant learning_rate",
        "model.fusion: ",
        "dat: unknown key; perhaps you meant data",
        "training.learning_rate: ",
    ):
        assert line in text
    assert text.startswith("6 wrong values")


def test_a_key_without_its_section_suggests_every_section_with_it(tmp_path: Path) -> None:
    text = wrong(tmp_path, "learning_rate: 1\nbakbone: x\nthreads: 2\ntrian: {}\ndata: {steps: 1}\n")
    for line in (
        "learning_rate: unknown key; perhaps you meant training.learning_rate\n",
        "bakbone: unknown key; perhaps you meant model.backbone\n",
        "threads: unknown key; perhaps you meant evaluation.threads or serve.threads\n",
        "trian: unknown key; perhaps you meant training\n",
        "data.steps: unknown key\n",
    ):
        assert line in text + "\n"


def test_too_few_values_are_reported_once_with_the_expected_count(tmp_path: Path) -> None:
    text = wrong(tmp_path, "model: {atrous_rates: [2], early_strides: [3]}\ntraining: {crop_px: []}\n")
    assert text.startswith("4 wrong values")
    assert "model.atrous_rates: expected 3 values (found [2])" in text
    assert "model.early_strides.0: " in text and "model.early_strides: expected 2 values (found [3])" in text
    assert "training.crop_px: expected 2 values (found [])" in text


def test_unknown_keys_in_a_list_of_sections_are_reported(tmp_path: Path) -> None:
    text = wrong(tmp_path, "training: {phases: [{after: 0.5, crop: [3, 3]}, {afte: 0.7}]}\n")
    assert "training.phases.0.crop: unknown key; perhaps you meant crop_px" in text
    assert "training.phases.1.afte: unknown key; perhaps you meant after" in text


def test_errors_describe_yaml_lists_and_sections_not_python_types(tmp_path: Path) -> None:
    text = wrong(tmp_path, "training: {freeze: backbone, crop_px: [1, 2, 3], loss: 3}\n")
    assert "training.freeze: expected a list such as [a, b] (found 'backbone')" in text
    assert "training.crop_px: expected at most 2 values" in text
    assert "training.loss: expected a section with its own keys" in text


def test_booleans_are_not_accepted_as_numbers(tmp_path: Path) -> None:
    text = wrong(tmp_path, "training: {seed: off, crop_px: [64, true], loss: {lovasz: true}}\n")
    for key in ("seed", "crop_px", "loss.lovasz"):
        assert f"training.{key}: expected a number, not true or false" in text
    right = tmp_path / "right.yaml"
    right.write_text("training: {deterministic: true, class_offsets: off, seed: 1}\n")
    training = load_config(right).training
    assert (training.deterministic, training.class_offsets, training.seed) == (True, False, 1)


def test_braces_in_a_validator_message_are_kept() -> None:
    class Strict(BaseModel):
        value: int

        @field_validator("value", mode="before")
        @classmethod
        def _never(cls, value: object) -> object:
            raise ValueError(f"never {value}")

    with pytest.raises(ValidationError) as caught:
        Strict(value="{name} {0}")
    assert "value: never {name} {0}" in describe(caught.value, "here")


def test_flags_override_the_file_with_dashes_and_underscores(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("training: {batch_size: 3, epochs: 2}\n")
    flags = ["--training.batch-size", "4", "--training.learning_rate", "0.5", "--data.holdout-sequences", "a", "b"]
    config = parse_flags(path, flags, "roadseg run", "")
    assert (config.training.batch_size, config.training.epochs, config.training.learning_rate) == (4, 2, 0.5)
    assert config.data.holdout_sequences == ("a", "b")


def test_an_invalid_flag_value_is_reported_as_in_yaml(tmp_path: Path) -> None:
    text = wrong(
        tmp_path,
        "model: {early_strides: [one, 2], output_stride: wide, fusion: foo, low_levels: [8, fine]}\n"
        "training: {steps: some, batch_size: many, crop_px: [64, all], learning_rate: fast, deterministic: maybe}\n",
    )
    flags = "--model.early-strides one 2 --model.output-stride=wide --model.fusion foo --model.low-levels 8 fine "
    flags += "--training.steps some --training.batch-size many --training.crop-px 64 all --training.learning-rate fast"
    flags += " --training.deterministic maybe"
    said = wrong(tmp_path, "", flags.split())
    assert said.splitlines()[1:] == text.splitlines()[1:] and said.startswith("9 wrong values in ")
    assert (
        "training.batch_size: input should be a valid integer, unable to parse string as an integer (found 'many')"
        in said
    )


@pytest.mark.parametrize(
    ("word", "value"), [("true", True), ("True", True), ("yes", True), ("false", False), ("no", False)]
)
def test_a_boolean_flag_takes_true_and_false(word: str, value: bool) -> None:
    assert parse_flags(None, ["--training.deterministic", word], "p", "d").training.deterministic is value


def test_length_is_epochs_or_steps_not_both(tmp_path: Path) -> None:
    assert "epochs (2) and steps (3) are both set" in wrong(tmp_path, "training: {epochs: 2, steps: 3}")


def test_init_from_accepts_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("training: {init_from: runs/step-00000012.safetensors}\n")
    training = parse_flags(path, [], "roadseg run", "").training
    assert (training.init_from, training.weights_from) == ("", "runs/step-00000012.safetensors")
    training = parse_flags(path, ["--training.init-from", "champion"], "roadseg run", "").training
    assert (training.init_from, training.weights_from) == ("champion", "")
    text = wrong(tmp_path, "training: {init_from: a.safetensors, weights_from: b.safetensors}")
    assert "init_from and weights_from are both set" in text


def test_folder_needs_its_labels(tmp_path: Path) -> None:
    assert "data.labels" in wrong(tmp_path, "data: {source: folder}")


def test_an_unreadable_file_is_one_sentence(tmp_path: Path) -> None:
    assert "not readable as YAML" in wrong(tmp_path, "a: [")
    assert "holds a list" in wrong(tmp_path, "- 1")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml")


def test_help_exits_with_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_flags(None, ["--help"], "roadseg run", "")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--training.learning-rate" in text and "peak learning rate" in text


def test_paths_and_speed_settings_stay_out_of_keys() -> None:
    here = load_config(None, {"data": {"root": "/a", "workers": 1}, "training": {"device": "cpu", "workers": 3}})
    there = load_config(None, {"data": {"root": "/b", "workers": 2}, "training": {"device": "cuda"}})
    assert here.key_fields() == there.key_fields()
    other = load_config(None, {"training": {"seed": 1}})
    assert other.key_fields() != here.key_fields()
    json.dumps(here.key_fields())


def test_the_schema_knows_every_section() -> None:
    assert set(Config.model_json_schema()["properties"]) == set(Config.model_fields)


def test_the_shown_config_can_be_loaded() -> None:
    config = load_config(CONFIGS[0])
    assert Config.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_a_flag_overrides_a_wrong_value_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("training: {batch_size: abc}\ndata: {source: folder}\n")
    config = parse_flags(path, ["--training.batch-size", "8", "--data.source=town"], "roadseg run", "")
    assert (config.training.batch_size, config.data.source) == (8, "town")


def test_a_path_may_be_a_string() -> None:
    assert load_config(str(CONFIGS[0])) == load_config(CONFIGS[0])


MIX = """
data:
  source: mix
  mix:
    city: {source: cityscapes, root: /a, weight: 2}
    drive: {source: bdd100k, root: /b, splits: [train]}
"""


def test_a_mix_is_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(MIX)
    data = parse_flags(path, ["--data.split", "val"], "roadseg run", "").data
    assert data.mix["city"].weight == 2 and data.mix["drive"].splits == ("train",)
    key = data.key_fields()["mix"]
    assert key["city"] == {"source": "cityscapes", "weight": 2.0, "splits": []}  # where it lies is in no key


def test_wrong_keys_of_a_mix_are_named_by_their_path(tmp_path: Path) -> None:
    text = MIX.replace("weight: 2", "wieght: 2").replace("root: /b, ", "")
    said = wrong(tmp_path, text)
    assert "data.mix.city.wieght: unknown key; perhaps you meant weight" in said
    assert "data.mix.drive" in said and "needs root" in said
    assert "finite" in wrong(tmp_path, MIX.replace("weight: 2", "weight: .inf"))
    assert "is for source 'folder'" in wrong(tmp_path, "data: {source: camvid, labels: x.yaml}")
    assert "needs at least one" in wrong(tmp_path, "data: {source: mix}")
    assert "is for source 'mix'" in wrong(tmp_path, MIX.replace("source: mix", "source: town"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data: {}\nmodel: {}\ndata: {source: town}\n", "line 3 repeats the key 'data' of line 1"),
        ("data:\n  town: {seed: 1, seed: 2}\n", "line 2 repeats the key 'seed'"),
        ("a: 2020-13-45", "month must be in"),
        ("[" * 3000, "nested too deep"),
        ("a: !!int ''", "not readable as YAML"),
        ("a: !!bool x", "not readable as YAML"),
        ("a: !!timestamp x", "not readable as YAML"),
        ("a: 0x" + "f" * 6000, "line 1 holds a huge number"),
        ("a: " + "9" * 6000, "not readable as YAML"),
    ],
)
def test_invalid_yaml_is_one_error(tmp_path: Path, text: str, says: str) -> None:
    assert says in wrong(tmp_path, text)


def test_a_key_may_override_a_merged_one(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("a: {b: &x {<<: &y {k: 1, m: 2}, k: 3}}\nc: {<<: *x, m: 4}\n")
    assert load_yaml(path, "") == {"a": {"b": {"k": 3, "m": 2}}, "c": {"k": 3, "m": 4}}
