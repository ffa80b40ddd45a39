"""Tokenizer files, and directories that appear only when whole."""

from nemo_minitron.checkpoint.directory import (
    copy_tokenizer_files,
    prepare_partial,
    publish_partial,
    tokenizer_files,
)


def test_copies_tokenizer_files_and_nothing_else(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer.model", "generation_config.json", "model.safetensors", "config.json"):
        (source / name).write_text(name)
    copy_tokenizer_files(source, target)
    assert sorted(path.name for path in target.iterdir()) == [
        "generation_config.json", "tokenizer.json", "tokenizer.model"]
    assert sorted(path.name for path in tokenizer_files(target)) == ["tokenizer.json", "tokenizer.model"]


def test_publishing_replaces_an_earlier_directory_whole(tmp_path):
    directory = tmp_path / "checkpoint"
    for content in ("old", "new"):
        partial = prepare_partial(directory)
        (partial / content).write_text(content)
        assert [path.name for path in directory.parent.iterdir() if path == directory] == (
            ["checkpoint"] if content == "new" else [])
        publish_partial(directory)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert [path.name for path in directory.iterdir()] == ["new"]


def test_leftovers_of_an_interrupted_run_are_dropped(tmp_path):
    (prepare_partial(tmp_path / "checkpoint") / "stale").write_text("x")
    assert list(prepare_partial(tmp_path / "checkpoint").iterdir()) == []
