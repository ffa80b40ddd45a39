"""Scores of the live model under every layout are those of `transformers`, and of lm_eval's own `hf` model."""

import os
from pathlib import Path

import pytest
import torch
import transformers

from nemo_minitron.checkpoint.families import read_arch
from tests.support.tiny_llama import LAYOUTS, formed

pytest.importorskip("lm_eval", reason="needs the extra eval")

ROOT = Path(__file__).resolve().parents[3]
STORIES = Path(os.environ.get("MINITRON_SHARED", ROOT.parent / "shared" / "data")) / "stories260K-hf"
DEMO_TEACHER = ROOT / "models" / "sympy-llama-2.8m"
PAIRS = [("def factorial(n):\n    ", "return 1"), ("import ", "sympy"), ("", "from sympy import Symbol"),
         ("x = Symbol('x')\nassert x ", "== x"), ("x = Symbol('x')\nassert x ", "!= y"), ("class A", ":"),
         ("The answer is", " A"), ("The answer is", " B"), ("The answer is", " C"),
         ("".join(f"a_{number} = {number}\n" for number in range(200)), "b = 1\n")]  # longer than the context
TEXT = "".join(f"def f_{number}(x):\n    return x + {number}\n" for number in range(90))
PROMPTS = ["def expand(self):\n    ", "import", "class Foo(Basic):\n    def"]
GENERATION = {"until": ["\n\n"], "max_gen_toks": 40, "do_sample": False}


def requests_of(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=pair, idx=number) for number, pair in enumerate(arguments)]


def ask(model):
    """What lm_eval would ask of a model: log-likelihoods, a rolling one, generated texts."""
    pairs = model.loglikelihood(requests_of("loglikelihood", PAIRS), disable_tqdm=True)
    return {"pairs": [[log_prob, bool(greedy)] for log_prob, greedy in pairs],
            "rolling": model.loglikelihood_rolling(requests_of("loglikelihood_rolling", [(TEXT,)]), disable_tqdm=True),
            "texts": model.generate_until(requests_of("generate_until", [(text, GENERATION) for text in PROMPTS]))}


def answers(rank, world_size, *, path, layout, fail=False):
    """A job: the answers on rank 0; the other ranks follow."""
    import torch.distributed as dist

    from nemo_minitron.data.tokenizer import load_tokenizer
    from nemo_minitron.evaluate.live import LiveModel
    from nemo_minitron.model.build import load_model, transformer_config

    def share(value):
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    arch = read_arch(Path(path))
    with formed(layout) as degrees:
        model = load_model(arch, Path(path), transformer_config(arch, degrees))
        live = LiveModel(model=model, tokenizer=load_tokenizer(Path(path)), layout=degrees, rank=rank, share=share,
                         micro_batch_size=3, chunk_tokens=64)
        if rank:
            live.follow()
            return None
        from nemo_minitron.evaluate.harness import HarnessModel

        if fail:
            with pytest.raises(ZeroDivisionError), live.directing():
                raise ZeroDivisionError
            return None
        with live.directing():
            return ask(HarnessModel(live))


@pytest.fixture(scope="module")
def of_hf_model():
    """lm_eval's own model on the same directory."""
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_TEACHER, dtype=torch.float32)
    return ask(HFLM(pretrained=model, tokenizer=transformers.AutoTokenizer.from_pretrained(DEMO_TEACHER), batch_size=1,
                    device="cpu"))


@pytest.mark.parametrize("layout", ["1x1", "tp2", "pp2", "dp2", "tp2 pp2"])
def test_answers_are_those_of_lm_evals_own_model(rank_pool, of_hf_model, layout):
    found = rank_pool(LAYOUTS[layout].world_size).run(f"{__name__}:answers", path=str(DEMO_TEACHER), layout=layout)[0]
    for (log_prob, greedy), (expected, expected_greedy) in zip(found["pairs"], of_hf_model["pairs"], strict=True):
        assert log_prob == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy
    assert any(greedy for _, greedy in found["pairs"]) and not all(greedy for _, greedy in found["pairs"])
    assert found["rolling"] == pytest.approx(of_hf_model["rolling"], rel=1e-6)
    assert found["texts"] == of_hf_model["texts"]


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs stories260K-hf in the folder that MINITRON_SHARED names")
@pytest.mark.parametrize("layout", ["tp2", "pp2"])
@torch.no_grad()
def test_log_likelihoods_are_those_of_transformers(rank_pool, layout):
    found = rank_pool(2).run(f"{__name__}:answers", path=str(STORIES), layout=layout)[0]["pairs"]
    model = transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    for (context, continuation), (log_prob, _) in list(zip(PAIRS, found, strict=True))[:2]:
        whole, alone = tokenizer(context.rstrip() + context[len(context.rstrip()):] + continuation)["input_ids"], \
            tokenizer(context.rstrip())["input_ids"]
        log_probs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        expected = sum(log_probs[place - 1, whole[place]].item() for place in range(len(alone), len(whole)))
        assert log_prob == pytest.approx(expected, abs=1e-4)


def test_ranks_that_follow_are_let_go_when_rank_0_fails(rank_pool):
    rank_pool(2).run(f"{__name__}:answers", path=str(DEMO_TEACHER), layout="pp2", fail=True, timeout=60)
