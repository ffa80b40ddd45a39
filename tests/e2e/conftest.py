"""A tiny teacher, a small folder of text, and one finished run of them that several tests look at."""

import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from nemo_minitron.arch import ArchSpec
from nemo_minitron.checkpoint.digest import write_random
from nemo_minitron.data.tokenizer import train_bpe
from tests.e2e.command import Finished, Inputs, run_well

TEACHER = ArchSpec(family="llama", num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4,
                   num_query_groups=2, head_dim=16, vocab_size=300, max_position_embeddings=64)
WORDS = ("the", "a", "small", "red", "old", "cat", "dog", "bird", "tree", "house", "ran", "sat", "flew", "saw", "under",
         "over", "and", "then", "it", "was", "happy", "again")


def write_text(folder: Path, num_documents: int = 40) -> list[str]:
    """Documents of random sentences, one a file; returns them."""
    draw = random.Random(7)
    folder.mkdir(parents=True)
    documents = [". ".join(" ".join(draw.choices(WORDS, k=draw.randint(4, 9))) for _ in range(25)) + ".\n"
                 for _ in range(num_documents)]
    for i, document in enumerate(documents):
        (folder / f"{i:03d}.txt").write_text(document)
    return documents


def train(directory: Path, documents: list[str], num_steps: int = 150) -> None:
    """Teach the checkpoint in `directory` the documents, by `transformers` alone, and save it there again."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    stream = torch.tensor([token for document in documents for token in [0, *tokenizer(document)["input_ids"]]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(num_steps):
        starts = torch.randint(len(stream) - 32, (16, 1))
        tokens = stream[starts + torch.arange(32)]
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(directory)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Teacher and text; tests must not change them."""
    folder = tmp_path_factory.mktemp("inputs")
    documents = write_text(folder / "text")
    assert train_bpe(documents, folder / "tokenizer", vocab_size=TEACHER.vocab_size) == TEACHER.vocab_size
    write_random(TEACHER, folder / "teacher", tokenizer_directory=folder / "tokenizer", seed=3)
    train(folder / "teacher", documents[:-4])
    return Inputs(folder / "teacher", folder / "text")


@pytest.fixture(scope="session")
def undisturbed(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """The directory of one whole run of the tiny recipe, and how its command ended; tests must not change it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finished = run_well(inputs.arguments(folder / "outputs"), folder)
    return folder / "outputs" / "tiny", finished


@pytest.fixture
def a_run(undisturbed: tuple[Path, Finished], tmp_path: Path) -> Path:
    """A copy of the finished run that a test may go on from: `tmp_path/outputs/tiny`."""
    shutil.copytree(undisturbed[0].parent, tmp_path / "outputs")
    return tmp_path / "outputs" / "tiny"


@pytest.fixture
def halfway(a_run: Path, tmp_path: Path) -> Path:
    """`tmp_path`, with a run that has scored and pruned only."""
    for stage in ("distill", "evaluate", "report"):
        shutil.rmtree(a_run / "round1" / stage)
    return tmp_path
