"""Distributed checkpoints that plain PyTorch writes: the spellings of Megatron's versions, and what must be refused."""

import dataclasses
import io
import json
import os
import pickle  # noqa: S403  to write what must be refused
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nemo_minitron.checkpoint.distributed import METADATA_FILE, DistributedCheckpoint
from nemo_minitron.checkpoint.megatron import import_megatron
from nemo_minitron.errors import CheckpointError
from tests.support.checkpoints import UNTIED, megatron_parameters, read_llama, write_llama

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LAYER = "decoder.layers.{}."


def parameters(tensors, *, transformer_engine=True):
    return megatron_parameters(tensors, UNTIED, tp_rank=0, tp_size=1, layers=range(UNTIED.num_layers),
                               transformer_engine=transformer_engine)


def stacked(state):
    """The same with all layers of a parameter in one tensor, under its name without the layer's number."""
    first = LAYER.format(0)
    return {name: tensor for name, tensor in state.items() if not name.startswith("decoder.layers.")} | {
        "decoder.layers." + name.removeprefix(first):
            torch.stack([state[name.replace(first, LAYER.format(layer))] for layer in range(UNTIED.num_layers)])
        for name in state if name.startswith(first)}


def write(state, directory):
    dcp.save(state, storage_writer=dcp.FileSystemWriter(directory), no_dist=True)


@pytest.fixture
def hf(tmp_path, monkeypatch):
    """A Hugging Face directory, and its tensors."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hf", write_llama(UNTIED, tmp_path / "hf", dtype=torch.bfloat16)


@pytest.fixture
def broken(hf, tmp_path):
    """A checkpoint to be spoilt, and a function that spoils its metadata by one that changes them."""
    out = tmp_path / "out"
    write(parameters(hf[1]), out)

    def change(how):
        metadata = pickle.loads((out / METADATA_FILE).read_bytes())  # noqa: S301  our own
        how(metadata)
        (out / METADATA_FILE).write_bytes(pickle.dumps(metadata))

    return out, change


def refuse(out, message):
    with pytest.raises(CheckpointError, match=message):
        import_megatron(out, out.parent / "hf", out.parent / "imported")
    assert not list(out.parent.glob("imported*")) and not Path("executed").exists()


@pytest.mark.parametrize("prefix", ["", "module.", "model.module.", "state_dict.module."])
@pytest.mark.parametrize("layers", [dict, stacked])
@pytest.mark.parametrize("transformer_engine", [True, False])
def test_every_spelling_is_read_and_what_is_no_weight_is_passed_over(hf, tmp_path, prefix, layers, transformer_engine):
    state = layers(parameters(hf[1], transformer_engine=transformer_engine))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):  # Megatron-LM pads to multiples of 128
        state[name] = torch.cat([state[name], torch.full((128 - UNTIED.vocab_size, UNTIED.hidden_size), torch.nan)])
        state[name] = state[name].bfloat16()
    state = {prefix + name: tensor for name, tensor in state.items()}
    state |= {"optimizer.state.exp_avg." + name: tensor.float() for name, tensor in state.items()}
    state |= {prefix + "decoder.layers.self_attention._extra_state": io.BytesIO(b"x"), "rng_state": torch.zeros(3),
              "iteration": 7, prefix + "rotary_pos_emb.inv_freq": torch.zeros(3)}
    write(state, tmp_path / "run" / "weights")
    import_megatron(tmp_path / "run", hf[0], tmp_path / "imported")
    found = read_llama(tmp_path / "imported")
    assert found.keys() == hf[1].keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in hf[1].items())
    assert json.loads((tmp_path / "imported" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["decoder.layers.4.mlp.linear_fc2.weight", "decoder.layers.mlp.linear_fc2.bias",
                                  "module.decoder.layers.0.self_attention.linear_qkv.bias",
                                  "embedding.position_embeddings.weight"])
def test_a_parameter_that_the_config_does_not_know_of_is_refused(hf, tmp_path, name):
    write(parameters(hf[1]) | {name: torch.zeros(3)}, tmp_path / "out")
    refuse(tmp_path / "out", f"does not know of; expected a llama of 4 layers; found {name} \\(change config\\)")


def test_a_head_of_its_own_beside_a_tied_config_is_refused(hf, broken):
    config = json.loads((hf[0] / "config.json").read_text())
    (hf[0] / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    refuse(broken[0], "does not know of.*found output_layer.weight")


def test_shapes_are_checked_before_any_data_is_read(hf, tmp_path):
    state = parameters(hf[1])
    state["output_layer.weight"] = state["output_layer.weight"][:100]
    write(state, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.distcp"):
        path.unlink()
    refuse(tmp_path / "out", "output_layer.weight.*shape \\(101, 24\\); found shape \\(100, 24\\) \\(change config\\)")


def test_types_that_are_no_weights_are_refused(hf, tmp_path):
    state = parameters(hf[1])
    state["output_layer.weight"] = state["output_layer.weight"].to(torch.int8)
    write(state, tmp_path / "out")
    refuse(tmp_path / "out", "output_layer.weight.*unsupported type.*torch.int8")


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("content", [
    pickle.dumps(Payload(), 0), pickle.dumps({"state_dict_metadata": Payload()}, 4), b"cbuiltins\neval\n.",
    b"ctorch\nload\n.", b"ctorch\n_dynamo\n.", b"ctorch\nserialization.load\n.", b"ccopyreg\n_reconstructor\n.",
    b"cnumpy\nload\n."])
def test_metadata_that_name_anything_else_are_refused(broken, content):
    (broken[0] / METADATA_FILE).write_bytes(content)
    refuse(broken[0], "has no place there.*found \\w+\\.")


@pytest.mark.parametrize("name", ["torch.distributed.checkpoint.metadata\nos.system", "pathlib\nos.system",
                                  "torch.distributed.checkpoint.api\ntraceback.os.system"])
def test_a_function_reached_through_an_allowed_module_is_not_called(broken, name):
    (broken[0] / METADATA_FILE).write_bytes(f"c{name}\n(S'touch executed'\ntR.".encode())
    refuse(broken[0], "bad metadata")


def test_pickled_code_in_place_of_a_chunk_is_not_run(broken):
    out, change = broken
    data = io.BytesIO()
    torch.save(Payload(), data)
    (out / "evil.distcp").write_bytes(data.getvalue())

    def point(metadata):
        for index, info in metadata.storage_data.items():
            metadata.storage_data[index] = dataclasses.replace(info, relative_path="evil.distcp", offset=0,
                                                               length=len(data.getvalue()))

    change(point)
    refuse(out, "bad data in .*evil.distcp")


def altered(**values):
    """Changes every place in a file."""
    def change(metadata):
        for index, info in metadata.storage_data.items():
            metadata.storage_data[index] = dataclasses.replace(info, **values)
    return change


def moved(metadata):
    """Moves a chunk out of its tensor."""
    entry = metadata.state_dict_metadata["output_layer.weight"]
    entry.chunks[0] = dataclasses.replace(entry.chunks[0], sizes=torch.Size([102, 24]))


def emptied(metadata):
    metadata.state_dict_metadata["output_layer.weight"].chunks.clear()


def lost(metadata):
    metadata.storage_data.clear()


@pytest.mark.parametrize(("change", "message"), [
    (altered(offset=-1), "bad metadata"), (altered(length=10**15), "truncated file"),
    (altered(offset="x"), "bad metadata"), (altered(relative_path=".."), "cannot read"),
    (altered(relative_path="../out/__0_0.distcp"), "plain file names"),
    (moved, "bad metadata"), (emptied, "output_layer.weight.* is not whole.*expected 2424 values; found 0"),
    (lost, "bad metadata")])
def test_metadata_that_do_not_fit_the_files(broken, change, message):
    broken[1](change)
    refuse(broken[0], message)


@pytest.mark.parametrize("cut", [1, 7, 100, 1000])
def test_metadata_cut_short(broken, cut):
    path = broken[0] / METADATA_FILE
    path.write_bytes(path.read_bytes()[:cut])
    refuse(broken[0], "bad metadata")


@pytest.mark.parametrize(("tracker", "folder"), [("30\n", "iter_0000030"), ("release", "release")])
def test_the_tracker_file_says_which_iteration(broken, tracker, folder, tmp_path):
    shutil.copytree(broken[0], tmp_path / "run" / folder)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text(tracker)
    assert DistributedCheckpoint(tmp_path / "run").directory == tmp_path / "run" / folder


@pytest.mark.parametrize("file", ["mp_rank_00/model_optim_rng.pt", "iter_0000030/mp_rank_00/model_optim_rng.pt",
                                  "model.embedding.word_embeddings.weight/.zarray"])
def test_older_formats_are_refused_with_how_to_convert_them(hf, tmp_path, file):
    (tmp_path / "run" / file).parent.mkdir(parents=True)
    (tmp_path / "run" / file).write_text("")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("30")
    refuse(tmp_path / "run", "--ckpt-convert-format torch_dist")


def test_a_tracker_file_of_other_bytes_names_nothing(hf, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\xb2")
    refuse(tmp_path / "run", "no distributed checkpoint")
