"""Greedy decoding is `transformers`' greedy decoding token for token, and sampling is the same under every layout."""

import os
from pathlib import Path

import pytest
import torch
import transformers

from nemo_minitron.checkpoint.families import read_arch
from tests.support.tiny_llama import LAYOUTS, NEMOTRON, QWEN3, SCALED_ROPE, formed, write_model

ROOT = Path(__file__).resolve().parents[3]
STORIES = Path(os.environ.get("MINITRON_SHARED", ROOT.parent / "shared" / "data")) / "stories260K-hf"
DEMO_TEACHER = ROOT / "models" / "sympy-llama-2.8m"
TEXTS = {DEMO_TEACHER: ["def factorial(n):\n    ", "import", "class Matrix:\n    def __init__(self, rows, cols):\n"
                        "        self.rows = rows\n", "x = symbols('x')\nassert"],
         STORIES: ["Once upon a time, there was a little", "Lily", "The dog ran to the park. He saw a big", "One day"]}
LENGTHS = (9, 1, 4, 16, 2, 7, 5)  # of random prompts; 7 rows in passes of 2: no layout's waves are full
NEW_TOKENS = 12


def continuations(rank, world_size, *, path, layout, prompts, size, stop=(), **sampling):
    """A job: the tokens after each prompt."""
    from nemo_minitron.generate.decode import generate
    from nemo_minitron.generate.sampling import Sampling
    from nemo_minitron.model.build import load_model, transformer_config

    arch = read_arch(Path(path))
    with formed(layout) as degrees:
        model = load_model(arch, Path(path), transformer_config(arch, degrees))
        before = model.rotary_pos_emb, [layer.self_attention.core_attention for layer in model.decoder.layers]
        found = generate(model, prompts, Sampling(**sampling), lambda tokens: tokens[-1] in stop, layout=degrees,
                         micro_batch_size=size)
        after = model.rotary_pos_emb, [layer.self_attention.core_attention for layer in model.decoder.layers]
    assert before == after
    return found


def run(rank_pool, path, layout, prompts, **how):
    """What every rank found, which must be the same."""
    results = rank_pool(LAYOUTS[layout].world_size).run(f"{__name__}:continuations", path=str(path), layout=layout,
                                                        prompts=prompts, **how)
    assert all(result == results[0] for result in results)
    return results[0]


@torch.no_grad()
def greedy(path, prompts, num_tokens, stop=()):
    """`transformers`' own, one unpadded prompt at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.generation_config = transformers.GenerationConfig(eos_token_id=list(stop) or None, pad_token_id=0)
    # with a mask: without one, `transformers` takes tokens that happen to be the padding token for padding
    whole = [model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
                            max_new_tokens=num_tokens)[0] for prompt in prompts]
    return [tokens[len(prompt):].tolist() for tokens, prompt in zip(whole, prompts, strict=True)]


def random_prompts(vocab_size):
    return [torch.randint(vocab_size, (length,)).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    directory = tmp_path_factory.mktemp("decode")
    models = {"scaled rope": SCALED_ROPE, "nemotron": NEMOTRON, "qwen3": QWEN3}
    return {name: write_model(arch, directory / name.replace(" ", "_")) for name, arch in models.items()}


@pytest.mark.parametrize(("name", "layout"), [
    *[("scaled rope", layout) for layout in ("1x1", "tp2", "pp2", "dp2", "tp2 pp2")],
    ("nemotron", "1x1"), ("nemotron", "pp2"), ("qwen3", "tp2")])
def test_greedy_is_that_of_transformers(rank_pool, paths, name, layout):
    prompts = random_prompts(SCALED_ROPE.vocab_size)
    found = run(rank_pool, paths[name], layout, prompts, size=2, max_new_tokens=NEW_TOKENS)
    assert found == greedy(paths[name], prompts, NEW_TOKENS)


@pytest.mark.parametrize("layout", ["1x1", "tp2", "pp2"])
@pytest.mark.parametrize("path", TEXTS, ids=["demo teacher", "stories260K"])
def test_greedy_of_trained_models(rank_pool, path, layout):
    if not path.is_dir():
        pytest.skip("needs stories260K-hf in the folder that MINITRON_SHARED names")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    prompts = [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
               for text in TEXTS[path]]
    found = run(rank_pool, path, layout, prompts, size=4, max_new_tokens=60)
    assert found == greedy(path, prompts, 60)


def test_a_row_that_stops_leaves_the_others_alone(rank_pool, paths):
    prompts = random_prompts(SCALED_ROPE.vocab_size)
    whole = greedy(paths["scaled rope"], prompts, NEW_TOKENS)
    stop = [whole[2][3], whole[5][6]]
    found = run(rank_pool, paths["scaled rope"], "pp2", prompts, size=3, stop=stop, max_new_tokens=NEW_TOKENS)
    assert found == greedy(paths["scaled rope"], prompts, NEW_TOKENS, stop)
    assert len(found[2]) <= 4 and len({len(tokens) for tokens in found}) > 1


def test_sampling_does_not_depend_on_the_layout_or_the_batch(rank_pool, paths):
    how = {"max_new_tokens": NEW_TOKENS, "temperature": 0.8, "top_p": 0.95}
    prompts = random_prompts(SCALED_ROPE.vocab_size)
    found = {(layout, size): run(rank_pool, paths["scaled rope"], layout, prompts, size=size, seed=3, **how)
             for layout, size in (("1x1", 2), ("1x1", 7), ("tp2", 2), ("pp2", 2), ("dp2", 3))}
    assert all(tokens == found["1x1", 2] for tokens in found.values())
    other = run(rank_pool, paths["scaled rope"], "1x1", prompts, size=2, seed=4, **how)
    assert other != found["1x1", 2] != greedy(paths["scaled rope"], prompts, NEW_TOKENS)
