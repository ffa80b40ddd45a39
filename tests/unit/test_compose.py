import dataclasses

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_minitron.compose import conf_dir, config_from_dict, load_config
from nemo_minitron.config import Config
from nemo_minitron.errors import ConfigError

GROUPS = sorted(path.relative_to(conf_dir()).with_suffix("").as_posix() for path in conf_dir().glob("*/*.yaml"))


def test_the_files_say_what_the_dataclasses_say():
    assert load_config([]) == Config()


def test_every_key_of_the_dataclasses_is_in_the_files():
    def keys(data, prefix=""):
        return {f"{prefix}{key}.{inner}" for key, value in data.items() if isinstance(value, dict)
                for inner in keys(value)} | {prefix + key for key in data}

    written = yaml.safe_load((conf_dir() / "config.yaml").read_text())
    for choice in written.pop("defaults"):
        if isinstance(choice, dict) and "optional experiment" not in choice:
            ((group, member),) = choice.items()
            written[group] = yaml.safe_load((conf_dir() / group / f"{member}.yaml").read_text())
    assert keys(written) == keys(Config().to_dict())


@pytest.mark.parametrize("choice", GROUPS)
def test_every_file_composes(choice):
    group, name = choice.split("/")
    config = load_config([f"{group}={name}"])
    if group == "experiment":
        assert config.name == name
    else:
        assert getattr(config, group) == getattr(config_from_dict({group: written_values(group, name)}), group)


def written_values(group, name):
    """Of a file and, below it, of those that its defaults name."""
    own = yaml.safe_load((conf_dir() / group / f"{name}.yaml").read_text())
    values = OmegaConf.create()
    for below in own.pop("defaults", []):
        if below == "_self_":
            continue
        values = OmegaConf.merge(values, written_values(group, below))
    return OmegaConf.to_container(OmegaConf.merge(values, own))


def test_overrides_win_over_the_experiment():
    config = load_config(["experiment=demo", "distill.tokens=64", "parallel.tp=2", "controls=[ce,scratch]"])
    assert (config.distill.tokens, config.parallel.tp, config.controls) == (64, 2, ["ce", "scratch"])
    assert config.prune == load_config(["experiment=demo"]).prune
    assert config.prune.target.hidden_size is not None


def test_the_shipped_teacher_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = load_config(["experiment=demo"]).teacher.path
    assert path is not None and path.startswith(str(conf_dir().parent / "models"))


def test_plain_data_and_back():
    config = load_config(["experiment=demo", "data.path=x", "name=other"])
    assert config_from_dict(config.to_dict()) == config
    assert dataclasses.asdict(config) == config.to_dict()


def test_a_round_may_name_a_search_of_the_files():
    config = load_config(["rounds=[{name: a, search: minitron_4b}, {name: b, source: a, target: {num_layers: 2}}]"])
    assert config.rounds[0].search == load_config(["search=minitron_4b"]).search and config.rounds[1].search is None
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("rounds", "named"), [
    ("{name: a}", r"without a target.*rounds\[0\].target"),
    ("{target: {num_layers: 2}}", "name"),
    ("{name: teacher, target: {num_layers: 2}}", "rounds.0..name"),
    ("{name: a/b, target: {num_layers: 2}}", "rounds.0..name"),
    ("{name: a, target: {num_layers: 2}}, {name: a, target: {num_layers: 1}}", "rounds.1..name"),
    ("{name: a, source: b, target: {num_layers: 2}}, {name: b, target: {num_layers: 2}}",
     "source does not exist; expected teacher; found 'b'.*rounds.0..source"),
    ("{name: a, teacher: nearest, target: {num_layers: 2}}", "original, source.*rounds.0..teacher"),
    ("{name: a, search: nope}", "minitron_4b.*'nope'.*rounds.search"),
    ("{name: a, search: minitron_4b, drop: [1]}", "search and drop.*rounds.0..search"),
    ("{name: a, drop: [1], distill: {tokens: 0}}", "rounds.0..distill.tokens"),
    ("{name: a, drop: [1], colour: red}", "colour"),
])
def test_bad_rounds_are_named(rounds, named):
    with pytest.raises(ConfigError, match=named):
        load_config([f"rounds=[{rounds}]"])


@pytest.mark.parametrize("override", ["prune.target.num_layers=2", "search=minitron_4b"])
def test_rounds_have_targets_of_their_own(override):
    with pytest.raises(ConfigError, match="a target beside rounds"):
        load_config(["rounds=[{name: a, target: {num_layers: 2}}]", override])


@pytest.mark.parametrize(("override", "named"), [
    ("plan.gpu=tpu", "plan.gpu"), ("search.tokens=-1", "search.tokens"),
    ("experiment=nope", "demo, demo_align, demo_rounds"), ("data=nope", "default, stories"), ("prune=3", "prune"),
    ("tokens=3", "'tokens'"), ("distill.token=3", "distill.token"), ("+distill.token=3", "distill.token"),
    ("distill.tokens=few", "distill.tokens"), ("distill.tokens=-1", "distill.tokens"), ("optim.lr=nan", "optim.lr"),
    ("optim.warmup_steps=-1", "optim.warmup_steps"), ("parallel.tp=0", "parallel.tp"), ("data.kind=xml", "data.kind"),
    ("importance.batch=max", "importance.batch"), ("stages=[score,fly]", "fly"), ("controls=[distill]", "controls"),
    ("name=a/b", "name"), ("name=.x", "name"), ("stages=[score", "'stages=[score'"), ("=3", "'=3'"), ("tp 2", "'tp 2'"),
    ("data.path=${nowhere}", "nowhere"),
])
def test_one_line_names_the_mistake(override, named):
    with pytest.raises(ConfigError) as error:
        load_config([override])
    assert named in str(error.value) and "\n" not in str(error.value)


def test_data_that_is_no_recipe():
    with pytest.raises(ConfigError, match="colour"):
        config_from_dict({"colour": "red"})
