"""`minitron data prepare`: token files by several processes, resumable, the same bytes whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nemo_minitron.cli import main
from nemo_minitron.data.bulk import BulkInput, build_bulk, stored_dtype
from nemo_minitron.data.indexed import build, token_dtype, write_index
from nemo_minitron.data.tokenizer import encode_documents, load_tokenizer
from nemo_minitron.errors import ConfigError, DataError

pytestmark = pytest.mark.timeout(240)  # processes that import transformers, on a machine that may be busy
TOKENIZER = Path(__file__).parents[3] / "models" / "sympy-llama-2.8m"
TEXTS = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 5) for i in range(300)]
TEXTS[7] = "  \n"


def quiet(_line):
    pass


@pytest.fixture
def folder(tmp_path):
    """JSON lines in two files and a text file of three documents."""
    folder = tmp_path / "input"
    folder.mkdir()
    for name, part in (("a.jsonl", TEXTS[:200]), ("c.jsonl", TEXTS[200:])):
        (folder / name).write_text("".join(json.dumps({"text": text, "more": 1}) + "\n" for text in part))
    (folder / "b.txt").write_text("one<|end|>two<|end|>three")
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What Megatron's own writer makes of the same documents."""
    prefix = tmp_path_factory.mktemp("expected") / "tokens"
    documents = [text for text in [*TEXTS[:200], "one", "two", "three", *TEXTS[200:]] if text.strip()]
    build(prefix, encode_documents(load_tokenizer(TOKENIZER), documents), np.uint16)
    return files(prefix)


def files(prefix):
    return [prefix.with_name(prefix.name + suffix).read_bytes() for suffix in (".bin", ".idx")]


def what(folder, **options):
    return BulkInput(path=folder, tokenizer=TOKENIZER, **({"separator": "<|end|>"} | options))


@pytest.mark.parametrize(("workers", "shard_bytes"), [(1, 1 << 20), (2, 900), (3, 5000)])
def test_any_number_of_processes_and_shards_gives_the_same_files(folder, expected, tmp_path, workers, shard_bytes):
    record = build_bulk(what(folder), tmp_path / "out" / "x", workers=workers, shard_bytes=shard_bytes, say=quiet)
    assert files(tmp_path / "out" / "x") == expected
    assert (record["num_documents"], record["num_empty"]) == (302, 1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x.bin", "x.idx", "x.json"]


def test_a_finished_pair_is_left_alone_and_another_is_not_overwritten(folder, tmp_path):
    said = []
    build_bulk(what(folder), tmp_path / "x", workers=1, say=quiet)
    before = (tmp_path / "x.bin").stat().st_mtime_ns
    (tmp_path / "x.parts").mkdir()  # of a run killed between its last file and its end
    build_bulk(what(folder), tmp_path / "x", workers=2, say=said.append)
    assert "is done" in said[0] and (tmp_path / "x.bin").stat().st_mtime_ns == before
    assert not (tmp_path / "x.parts").exists()
    with pytest.raises(ConfigError, match="output exists"):
        build_bulk(what(folder, separator=None), tmp_path / "x", workers=1, say=quiet)


def test_killed_and_run_again_it_gives_the_same_files(folder, expected, tmp_path):
    program = ("import sys; from nemo_minitron.data.bulk import *; from pathlib import Path\n"
               "if __name__ == '__main__':\n"
               "    build_bulk(BulkInput(path=Path(sys.argv[1]), tokenizer=Path(sys.argv[2]), separator='<|end|>'),\n"
               "               Path(sys.argv[3]), workers=2, shard_bytes=200)")
    (tmp_path / "program.py").write_text(program)
    prefix, parts = tmp_path / "x", tmp_path / "x.parts"
    process = subprocess.Popen([sys.executable, tmp_path / "program.py", folder, TOKENIZER, prefix],
                               stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(parts.glob("0*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    wait_until_gone(process.pid)
    done = len(list(parts.glob("0*.json")))
    assert done and not prefix.with_name("x.idx").exists()
    said = []
    build_bulk(what(folder), prefix, workers=2, shard_bytes=200, say=said.append)
    assert f"{done} of " in said[0]
    assert files(prefix) == expected


def wait_until_gone(session):
    """Its workers end with it."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    os.killpg(session, signal.SIGKILL)
    pytest.fail("workers outlived the command")


@pytest.mark.parametrize(("line", "key", "message"), [
    ('{"text": ', "text", "malformed JSON line"), ('{"text": "x"}', "body", 'string under "body"'),
    ('{"text": 3}', "text", "a int there"), ('{"text": "\\ud800"}', "text", "half a surrogate pair"),
])
def test_a_worker_s_complaint_is_the_command_s(tmp_path, line, key, message, capsys):
    (tmp_path / "x.jsonl").write_text(line + "\n")
    code = main(["data", "prepare", f"input={tmp_path}", f"output={tmp_path / 'o'}", f"tokenizer={TOKENIZER}",
                 f"json_key={key}", "workers=1"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and error.startswith("minitron: ") and message in error and "line 1" in error
    assert not (tmp_path / "o.bin").exists() and not (tmp_path / "o.idx").exists()


@pytest.mark.parametrize("content", [None, "{"])
def test_an_unusable_tokenizer_is_the_user_s_mistake_and_starts_nothing(tmp_path, content, capsys):
    (tmp_path / "x.txt").write_text("some text")
    (tmp_path / "tokenizer").mkdir()
    if content is not None:
        (tmp_path / "tokenizer" / "tokenizer.json").write_text(content)
    code = main(["data", "prepare", f"input={tmp_path / 'x.txt'}", f"output={tmp_path / 'o'}",
                 f"tokenizer={tmp_path / 'tokenizer'}", "workers=1"])
    assert code == 2 and "(change tokenizer)" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer", "x.txt"]


def test_a_file_that_is_no_text_is_named_with_the_command_s_key(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"ok\xff")
    with pytest.raises(DataError, match=r"invalid UTF-8 at offset 2 \(change input\)"):
        build_bulk(what(tmp_path), tmp_path / "o", workers=1, say=quiet)


def test_small_files_share_a_shard_and_documents_without_tokens_are_left_out(tmp_path):
    vocabulary = {"a": 0, "b": 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="b"))
    tokenizer.normalizer = normalizers.Replace("gone", "")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "in").mkdir()
    texts = ["a b", "gone", "b", *["a a"] * 37]
    for number, text in enumerate(texts):
        (tmp_path / "in" / f"{number:02d}.txt").write_text(text)
    build(tmp_path / "expected", encode_documents(load_tokenizer(tmp_path / "tokenizer"), texts), np.uint16)
    said = []
    record = build_bulk(BulkInput(path=tmp_path / "in", tokenizer=tmp_path / "tokenizer"), tmp_path / "x", workers=2,
                        say=said.append)
    assert files(tmp_path / "x") == files(tmp_path / "expected")
    assert (record["num_documents"], record["num_empty"], record["num_tokens"]) == (39, 1, 77)
    assert sum("%" in line for line in said) == 1


def test_an_empty_key_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    with pytest.raises(DataError, match="2 documents of nothing but whitespace"):
        build_bulk(what(tmp_path), tmp_path / "o", workers=1, say=quiet)
    assert not (tmp_path / "o.bin").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "no input"), (["input=x", "output=y"], "no tokenizer"), (["what=x"], "unknown argument"),
    (["input=x", "output=y", "tokenizer=z", "workers=0"], "workers"), (["x"], "unknown argument"),
    (["input=nowhere", "output=y", f"tokenizer={TOKENIZER}"], "a file or folder at nowhere"),
    (["input=x", "output=.", f"tokenizer={TOKENIZER}"], "no prefix"),
])
def test_bad_arguments(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "prepare", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_space_left_is_one_line_and_leaves_no_pair(folder, tmp_path):
    """A limit on the size of files stands for a full disk: the same kind of OSError."""
    program = ("import resource, signal, sys; from nemo_minitron.cli import main\n"
               "if __name__ == '__main__':\n"
               "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
               "    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))\n"
               "    sys.exit(main(['data', 'prepare', *sys.argv[1:]]))")
    (tmp_path / "program.py").write_text(program)
    finished = subprocess.run([sys.executable, tmp_path / "program.py", f"input={folder}", f"tokenizer={TOKENIZER}",
                               f"output={tmp_path / 'o'}", "workers=1"], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 2, finished.stderr
    assert "no space left on the device" in finished.stderr.splitlines()[-1]
    assert not (tmp_path / "o.bin").exists() and not (tmp_path / "o.idx").exists()


def test_no_space_for_the_whole_leaves_parts_of_which_broken_ones_are_made_anew(folder, expected, tmp_path):
    program = ("import resource, signal, sys; from pathlib import Path\n"
               "from nemo_minitron.data.bulk import BulkInput, build_bulk\n"
               "if __name__ == '__main__':\n"
               "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
               "    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))\n"
               "    build_bulk(BulkInput(path=Path(sys.argv[1]), tokenizer=Path(sys.argv[2]), separator='<|end|>'),\n"
               "               Path(sys.argv[3]), workers=1, shard_bytes=5000)")
    (tmp_path / "program.py").write_text(program)
    prefix = tmp_path / "out" / "x"
    finished = subprocess.run([sys.executable, tmp_path / "program.py", folder, TOKENIZER, prefix],
                              capture_output=True, text=True, timeout=120)
    assert "100%" in finished.stderr and "DataError: no space left on the device" in finished.stderr.splitlines()[-1]
    parts = tmp_path / "out" / "x.parts"
    assert [path.name for path in parts.parent.iterdir()] == ["x.parts"]
    assert not list(parts.glob("whole*")) and not list(parts.glob("*.partial"))
    os.truncate(parts / "000002.bin", 10)
    said = []
    build_bulk(what(folder), prefix, workers=1, shard_bytes=5000, say=said.append)
    num_shards = int(said[0].split()[3])
    assert f"{num_shards - 1} of {num_shards} shards" in said[0]
    assert files(prefix) == expected


@pytest.mark.parametrize("vocab_size", [10, 65499, 65500, 200_000])
def test_the_stored_type_is_megatron_s(vocab_size):
    assert stored_dtype(vocab_size) is token_dtype(vocab_size)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_the_index_is_megatron_s(tmp_path, dtype):
    build(tmp_path / "x", [np.arange(3), np.arange(1), np.arange(7)], dtype)
    write_index(tmp_path / "y.idx", np.array([3, 1, 7], np.int32), dtype)
    assert (tmp_path / "y.idx").read_bytes() == (tmp_path / "x.idx").read_bytes()
