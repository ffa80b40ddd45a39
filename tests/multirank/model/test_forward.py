"""Packed documents: what a model says of each is what `transformers` says of it alone, under every layout."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.support.tiny_llama import (
    DOCUMENT_LENGTHS,
    LAYOUTS,
    MISTRAL,
    QWEN3,
    SCALED_ROPE,
    TIED,
    formed,
    open_documents,
    write_documents,
    write_model,
)

SEQ_LENGTH = 32
MODELS = {"tied": TIED, "scaled rope": SCALED_ROPE, "mistral": MISTRAL, "qwen3": QWEN3}
TOLERANCES = {"float32": 1e-4, "float64": 1e-10}


def logits(rank, world_size, *, path, tokens, layout, dtype, out):
    """A job: save the logits of all samples, [n, S, padded V]."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from nemo_minitron.checkpoint.digest import read_checkpoint
    from nemo_minitron.distill.terms import tokens_first
    from nemo_minitron.evaluate.loss import padded_batch
    from nemo_minitron.model.build import load_model, transformer_config
    from nemo_minitron.parallel import groups
    from nemo_minitron.parallel.schedule import forward_only

    checkpoint = read_checkpoint(Path(path))
    samples = open_documents(tokens, seq_length=SEQ_LENGTH)
    with formed(layout) as degrees:
        model = load_model(checkpoint.arch, checkpoint.path, transformer_config(checkpoint.arch, degrees))
        model.to(getattr(torch, dtype))
        model.config.pipeline_dtype = getattr(torch, dtype)
        model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq.to(getattr(torch, dtype))

        def of_batch(hidden, batch):
            hidden_TH = tokens_first(hidden, sequence_parallel=model.config.sequence_parallel)
            whole_TV = gather_from_tensor_model_parallel_region(hidden_TH @ model.head().t())
            return whole_TV.unflatten(0, (SEQ_LENGTH, -1)).transpose(0, 1)

        count = samples.num_evaluation_samples
        batches = [padded_batch(samples, np.arange(count)[first : first + 2], 2) for first in range(0, count, 2)]
        results = forward_only(model, batches, num_microbatches=len(batches), consume=of_batch)
        if groups.is_last_stage() and groups.tp_rank() == 0:
            np.save(Path(out) / "logits.npy", torch.cat(results)[:count].numpy())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("packed")
    return {"tokens": str(write_documents(directory / "tokens")),
            **{name: str(write_model(arch, directory / name.replace(" ", "_"))) for name, arch in MODELS.items()}}


def alone(path, dtype):
    """`transformers`' model in `dtype` throughout: its norm and its angles are fp32 whatever the model's type."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").to(dtype)
    if dtype == torch.float64:
        for norm in [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]:
            norm.forward = lambda x, norm=norm: x * (x.square().mean(-1, keepdim=True)
                                                     + norm.variance_epsilon).rsqrt() * norm.weight
        frequencies = model.model.rotary_emb.inv_freq.double()

        def angles(x, position_ids):
            angle = torch.cat([position_ids.double().unsqueeze(-1) * frequencies] * 2, dim=-1)
            return angle.cos(), angle.sin()

        model.model.rotary_emb.forward = angles
    return model


def check(rank_pool, files, name, layout, dtype, out):
    rank_pool(LAYOUTS[layout].world_size).run(f"{__name__}:logits", path=files[name], tokens=files["tokens"],
                                              layout=layout, dtype=dtype, out=str(out))
    model = alone(files[name], getattr(torch, dtype))
    samples = open_documents(files["tokens"], seq_length=SEQ_LENGTH)
    found = torch.from_numpy(np.load(out / "logits.npy"))
    batch = samples.batch(range(len(found)))
    compared = []
    for row in range(len(found)):
        for document in range(1, int(batch.document_ids[row].max()) + 1):
            mine = batch.document_ids[row] == document
            with torch.no_grad():
                expected = model(batch.tokens[row, mine].unsqueeze(0)).logits[0]
            error = (found[row, mine][:, : expected.size(-1)] - expected).abs().max() / expected.abs().max()
            assert error <= TOLERANCES[dtype], (row, document, float(error))
            compared.append(int(mine.sum()))
    whole = [length - 1 for length in DOCUMENT_LENGTHS if length - 1 <= SEQ_LENGTH]
    assert sorted(compared) == sorted([*whole, 32, 17])


@pytest.mark.parametrize("layout", ["1x1", "tp2", "pp2", "tp2 sp", "tp2 pp2"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_documents_do_not_see_each_other(rank_pool, files, tmp_path, layout, dtype):
    check(rank_pool, files, "tied", layout, dtype, tmp_path)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "tied"])
def test_in_other_models_neither(rank_pool, files, tmp_path, name):
    check(rank_pool, files, name, "1x1", "float32", tmp_path)


def training(rank, world_size, *, path, teacher, tokens, layout, packed):
    """A job: loss and gradients of distillation on all documents, packed or one a sample, [loss, norm, numbers]."""
    from nemo_minitron.checkpoint.digest import read_checkpoint
    from nemo_minitron.distill.losses import LossWeights
    from nemo_minitron.distill.teacher import Teacher
    from nemo_minitron.distill.terms import loss_terms
    from nemo_minitron.model.build import load_model, transformer_config
    from nemo_minitron.model.forward import forward_batch

    with formed(layout) as degrees:
        student, source = read_checkpoint(Path(path)), read_checkpoint(Path(teacher))
        model = load_model(student.arch, student.path, transformer_config(student.arch, degrees))
        streamed = Teacher(source.arch, source.path, degrees)
        samples = open_documents(tokens, seq_length=SEQ_LENGTH, packed=packed)
        batch = samples.batch(range(samples.num_evaluation_samples))
        terms = loss_terms(model, forward_batch(model, batch), batch, teacher=streamed.hand_over(batch).logits,
                           weights=LossWeights(kl=0.7, ce=0.3))
        terms.loss_sum.backward()
        gradients = {name: parameter.grad.double().norm().item() for name, parameter in model.named_parameters()
                     if "norm" in name or "linear_qkv" in name}
        return {"sums": terms.sums.tolist(), "gradients": gradients, "samples": len(batch.tokens)}


def test_packing_changes_neither_losses_nor_gradients(rank_pool, files):
    """Of student and streamed teacher: the same documents in 5 packed samples and in 11."""
    arguments = {"path": files["tied"], "teacher": files["scaled rope"], "tokens": files["tokens"], "layout": "1x1"}
    (packed,) = rank_pool(1).run(f"{__name__}:training", packed=True, **arguments)
    (apart,) = rank_pool(1).run(f"{__name__}:training", packed=False, **arguments)
    assert packed["samples"] < apart["samples"] == len(DOCUMENT_LENGTHS) + 1
    assert packed["sums"] == pytest.approx(apart["sums"], rel=1e-5)
    assert packed["sums"][-1] == sum(DOCUMENT_LENGTHS) - len(DOCUMENT_LENGTHS)
    assert packed["gradients"] == pytest.approx(apart["gradients"], rel=1e-4)


def test_without_a_mask_they_would(files):
    """The comparison can fail."""
    model = alone(files["tied"], torch.float32)
    batch = open_documents(files["tokens"], seq_length=SEQ_LENGTH).batch([0])
    second = batch.document_ids[0] == 2
    with torch.no_grad():
        mixed, single = model(batch.tokens).logits[0, second], model(batch.tokens[:, second]).logits[0]
    assert (mixed - single).abs().max() > 1e-2 * single.abs().max()
