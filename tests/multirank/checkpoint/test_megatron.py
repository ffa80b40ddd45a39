"""Distributed checkpoints that Megatron itself saved under several layouts, and those we save, there and back."""

import contextlib
import io
import json
import os
import pickle  # noqa: S403  to write what must be refused
import shutil
from pathlib import Path

import pytest
import safetensors.torch
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


EXPORTED = ("llama tied", "qwen2", "qwen3", "nemotron", "nemotron in bf16")


@pytest.fixture(scope="module")
def exported(rank_pool, tmp_path_factory):
    """Of every family: the Hugging Face directory, and what `minitron export` wrote in both formats."""
    made = {}
    for name in EXPORTED:
        folder = tmp_path_factory.mktemp("exported")
        write_model(MODELS[name.removesuffix(" in bf16")], folder / "hf")
        if name.endswith("in bf16"):
            round_to_bf16(folder / "hf")
        rank_pool(1).run(f"{__name__}:export", hf=str(folder / "hf"), out=str(folder))
        made[name] = folder
    return made


def round_to_bf16(hf):
    """Store BF16, and say so as newer versions of `transformers` do: under `dtype`."""
    for path in hf.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        safetensors.torch.save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path,
                                    metadata={"format": "pt"})
    config = json.loads((hf / "config.json").read_text())
    config.pop("torch_dtype", None)
    (hf / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))


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
@pytest.mark.parametrize("name", EXPORTED)
def test_there_and_back_is_bit_equal(exported, tmp_path, name, kind):
    folder, out = exported[name], tmp_path / "imported"
    assert main(["import", f"megatron={folder / kind}", f"config={folder / 'hf'}", f"output={out}"]) == 0
    assert_same(out, folder / "hf")
    kinds = {tensor.dtype for tensor in read_llama(out).values()}
    assert kinds == {torch.bfloat16 if name.endswith("bf16") else torch.float32}


def load_with_extra_state(rank, world_size, *, hf, saved):
    """A job: load into what Transformer Engine's layers ask for besides weights, strictly and as the README says."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from torch.distributed.checkpoint.api import CheckpointException

    from nemo_minitron.checkpoint.families import read_arch
    from nemo_minitron.model.build import build_model, transformer_config

    with formed("1x1") as degrees:
        arch = read_arch(Path(hf))
        model = build_model(arch, transformer_config(arch, degrees))

        def wanted():
            key = "decoder.layers.self_attention.core_attention._extra_state"
            layers = {str(layer): ShardedObject(key, io.BytesIO(), (arch.num_layers,), (layer,))
                      for layer in range(arch.num_layers)}
            return model.sharded_state_dict() | layers

        try:
            dist_checkpointing.load(wanted(), saved)
            strictly = "loaded"
        except CheckpointException as error:
            strictly = str(error)
        loaded = dist_checkpointing.load(wanted(), saved, strict="log_unexpected")
        return strictly, loaded["decoder.final_layernorm.weight"].tolist()


def test_the_state_of_transformer_engine_is_left_out_by_a_load_that_only_logs(exported, rank_pool):
    folder = exported["llama tied"]
    [(strictly, norm)] = rank_pool(1).run(f"{__name__}:load_with_extra_state", hf=str(folder / "hf"),
                                          saved=str(folder / "megatron"))
    assert "_extra_state" in strictly
    assert norm == read_llama(folder / "hf")["model.norm.weight"].tolist()


def export_what_cannot_be(rank, world_size, *, hf, out):
    """A job: exports that fail, each with its exit code; the last two while files may only be so many bytes long."""
    import resource

    from megatron.core import dist_checkpointing

    from nemo_minitron.parallel import groups

    codes = [main(["export", f"checkpoint={hf}", f"output={hf}"]),
             main(["export", f"checkpoint={hf}/nothing", f"output={out}"])]
    save, stop, groups.stop = dist_checkpointing.save, groups.stop, groups.dissolve  # the worker lives on
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    printed = io.StringIO()
    try:
        for size in (200, 60000):  # too little for common.pt, too little for the weights

            def save_limited(*args, size=size):
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
                try:
                    save(*args)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, limits)

            dist_checkpointing.save = save_limited
            with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
                codes.append(main(["export", f"checkpoint={hf}", f"output={out}"]))
    finally:
        dist_checkpointing.save, groups.stop = save, stop
    return codes, printed.getvalue()


def test_an_export_that_fails_leaves_nothing(exported, rank_pool, tmp_path):
    hf = exported["llama tied"] / "hf"
    before = sorted(hf.iterdir())
    [(codes, printed)] = rank_pool(1).run(f"{__name__}:export_what_cannot_be", hf=str(hf), out=str(tmp_path / "out"))
    assert codes == [2, 2, 2, 2], printed
    lines = [line for line in printed.splitlines() if line.startswith("minitron: the checkpoint cannot be written; ")]
    assert len(lines) == 2 and "Traceback" not in printed
    assert sorted(hf.iterdir()) == before and not list(tmp_path.iterdir())


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
