"""Distributed checkpoints that Megatron itself saved under several layouts, and those we save, there and back."""

import json
import os
import pickle  # noqa: S403  to write what must be refused
import shutil
from pathlib import Path

import pytest
import torch

from nemo_minitron.checkpoint.distributed import METADATA_FILE, DistributedCheckpoint
from nemo_minitron.checkpoint.megatron import import_megatron
from nemo_minitron.cli import main
from nemo_minitron.errors import CheckpointError
from tests.support.checkpoints import read_llama
from tests.support.tiny_llama import FAMILIES, TIED, UNEVEN, formed, write_model

MODELS = {"llama tied": TIED, "llama of 3 layers": UNEVEN, **FAMILIES}
LAYOUTS = ("1x1", "tp2", "pp2", "tp2 sp")


def save(rank, world_size, *, layout, hf, out, prefix, metadata):
    """A job: load the Hugging Face directory and save it with Megatron-core."""
    from megatron.core import dist_checkpointing

    from nemo_minitron.checkpoint.families import read_arch
    from nemo_minitron.model.build import load_model, transformer_config
    from nemo_minitron.parallel.cpu import write_checkpoints_in_process

    write_checkpoints_in_process()
    with formed(layout) as degrees:
        arch = read_arch(Path(hf))
        model = load_model(arch, Path(hf), transformer_config(arch, degrees))
        state = model.sharded_state_dict(prefix=prefix, metadata=metadata)
        dist_checkpointing.save({"model": state, "iteration": 7}, out)


def load(rank, world_size, *, layout, hf, saved, prefix):
    """A job: what Megatron-core loads into a model of zeros is what our loader reads."""
    from megatron.core import dist_checkpointing

    from nemo_minitron.checkpoint.families import read_arch
    from nemo_minitron.model.build import build_model, load_model, transformer_config

    with formed(layout) as degrees:
        arch = read_arch(Path(hf))
        config = transformer_config(arch, degrees)
        expected, model = load_model(arch, Path(hf), config), build_model(arch, config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        loaded = dist_checkpointing.load(model.sharded_state_dict(prefix=prefix), saved)
        loaded = {name.removeprefix(prefix): value for name, value in loaded.items()}
        model.load_state_dict({name: value for name, value in loaded.items() if value is not None}, strict=False)
        for name, parameter in expected.named_parameters():
            assert torch.equal(dict(model.named_parameters())[name], parameter), name


@pytest.fixture(scope="module")
def saved(rank_pool, tmp_path_factory):
    """A function that saves a model under a layout once: (Hugging Face directory, distributed checkpoint)."""
    made = {}

    def make(name, layout, prefix="", metadata=None):
        key = (name, layout, prefix, str(metadata))
        if key not in made:
            folder = tmp_path_factory.mktemp("saved")
            write_model(MODELS[name], folder / "hf")
            (folder / "out").mkdir()
            rank_pool(1 if layout == "1x1" else 2).run(
                f"{__name__}:save", layout=layout, hf=str(folder / "hf"), out=str(folder / "out"), prefix=prefix,
                metadata=metadata)
            made[key] = folder / "hf", folder / "out"
        return made[key]

    return make


def assert_same(directory, expected):
    found, wanted = read_llama(directory), read_llama(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_what_megatron_saved_under_any_layout_is_read_bit_for_bit(saved, tmp_path, name, layout):
    hf, out = saved(name, layout)
    import_megatron(out, hf, tmp_path / "imported")
    assert_same(tmp_path / "imported", hf)
    assert (tmp_path / "imported" / "tokenizer.json").exists()


@pytest.mark.parametrize("layout", ["1x1", "pp2"])
def test_layers_stored_one_by_one_and_names_with_a_prefix(saved, tmp_path, layout):
    hf, out = saved("qwen3", layout, "module.", {"non_homogeneous_layers": True})
    assert any(".layers.0." in name for name in DistributedCheckpoint(out).tensors)
    shutil.copytree(out, tmp_path / "nemo" / "weights")
    import_megatron(tmp_path / "nemo", hf, tmp_path / "imported")
    assert_same(tmp_path / "imported", hf)


def test_the_newest_iteration_is_taken(saved, tmp_path):
    hf, out = saved("llama tied", "1x1")
    shutil.copytree(out, tmp_path / "run" / "iter_0000030")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("30\n")
    import_megatron(tmp_path / "run", hf, tmp_path / "imported")
    assert_same(tmp_path / "imported", hf)


@pytest.fixture(scope="module")
def exported(rank_pool, tmp_path_factory):
    """Of two families: the Hugging Face directory, and what `minitron export` wrote in both formats."""
    made = {}
    for name in ("qwen2", "nemotron"):
        folder = tmp_path_factory.mktemp("exported")
        write_model(MODELS[name], folder / "hf")
        rank_pool(1).run(f"{__name__}:export", hf=str(folder / "hf"), out=str(folder))
        made[name] = folder
    return made


def export(rank, world_size, *, hf, out):
    """A job: the command, in a process that has its groups already."""
    from nemo_minitron.parallel import groups

    stop, groups.stop = groups.stop, groups.dissolve  # the worker lives on
    try:
        for kind in ("megatron", "nemo"):
            assert main(["export", f"checkpoint={hf}", f"output={out}/{kind}", f"format={kind}"]) == 0
    finally:
        groups.stop = stop


@pytest.mark.parametrize("name", ["qwen2", "nemotron"])
@pytest.mark.parametrize(("kind", "prefix"), [("megatron", ""), ("nemo/weights", "module.")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_loads_what_is_exported_under_any_layout(exported, rank_pool, name, kind, prefix, layout):
    if layout == "pp2" and MODELS[name].num_layers % 2:
        pytest.skip("Megatron stores uneven stages layer by layer")
    folder = exported[name]
    rank_pool(1 if layout == "1x1" else 2).run(f"{__name__}:load", layout=layout, hf=str(folder / "hf"),
                                               saved=str(folder / kind), prefix=prefix)


@pytest.mark.parametrize("kind", ["megatron", "nemo"])
def test_there_and_back_is_bit_equal(exported, tmp_path, kind):
    for name, folder in exported.items():
        code = main(["import", f"megatron={folder / kind}", f"config={folder / 'hf'}", f"output={tmp_path / name}"])
        assert code == 0
        assert_same(tmp_path / name, folder / "hf")


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture
def broken(saved, tmp_path, monkeypatch):
    """A copy of a Hugging Face directory and its checkpoint, to be spoilt."""
    hf, out = saved("llama tied", "1x1")
    shutil.copytree(hf, tmp_path / "hf")
    shutil.copytree(out, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hf", tmp_path / "out"


def refuse(hf, out, message):
    with pytest.raises(CheckpointError, match=message):
        import_megatron(out, hf, hf.parent / "imported")
    assert not (hf.parent / "imported").exists() and not (hf.parent / "imported.partial").exists()


@pytest.mark.parametrize("payload", [Payload(), print, {"a": [os.getcwd]}])
def test_nothing_named_in_the_metadata_is_called(broken, payload):
    hf, out = broken
    (out / METADATA_FILE).write_bytes(pickle.dumps(payload))
    refuse(hf, out, "has no place there.*found (posix|builtins)\\.")
    assert not Path("executed").exists()


def test_another_architecture_is_refused_by_name(broken):
    hf, out = broken
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"intermediate_size": 60}))
    refuse(hf, out, "linear_fc1.weight.*shape \\(4, 120, 32\\); found shape \\(4, 128, 32\\) \\(change config\\)")


def test_more_layers_than_there_are(broken):
    hf, out = broken
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    refuse(hf, out, "does not fit config.json")


def test_a_head_that_is_not_there(broken):
    hf, out = broken
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    refuse(hf, out, "parameter missing.*output_layer.weight")


def test_a_truncated_file(broken):
    hf, out = broken
    for path in out.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:2000])
    refuse(hf, out, "truncated file")


def test_a_missing_file(broken):
    hf, out = broken
    for path in out.glob("*.distcp"):
        path.unlink()
    refuse(hf, out, "cannot read")


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps({"a": 1})])
def test_metadata_that_is_none(broken, content):
    hf, out = broken
    (out / METADATA_FILE).write_bytes(content)
    refuse(hf, out, "bad metadata")


@pytest.mark.parametrize(("name", "message"), [("mp_rank_00/model_optim_rng.pt", "old format"),
                                               ("decoder.weight/.zarray", "zarr"), ("x/y", "no distributed")])
def test_other_formats_are_told_apart(broken, name, message):
    hf, _ = broken
    (hf.parent / "other" / name).parent.mkdir(parents=True)
    (hf.parent / "other" / name).write_text("")
    refuse(hf, hf.parent / "other", message)


def test_an_existing_output_is_kept(broken):
    hf, out = broken
    with pytest.raises(CheckpointError, match="the output exists"):
        import_megatron(out, hf, hf)
    assert (hf / "config.json").exists()


@pytest.mark.parametrize("arguments", [["import", "megatron=x"], ["import", "what=x"], ["export", "checkpoint=x"],
                                       ["export", "checkpoint=x", "output=y", "format=onnx"]])
def test_bad_arguments(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
