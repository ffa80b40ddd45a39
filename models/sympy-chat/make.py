"""Makes the conversations and prompts beside it from the embedded corpus: functions with a docstring of one line.

    python models/sympy-chat/make.py [FOLDER]

The user says the signature and the docstring, the answer is the body, from the end of the line before it on: the demo's
tokenizer has one piece for the end of a line and the indentation after it. Functions come from the train split alone,
in the order of the sha256 of what the user says; prompts are other functions than conversations.
"""

import ast
import hashlib
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from nemo_minitron.data.corpus import corpus_files, corpus_root

NUM_CONVERSATIONS, NUM_PROMPTS = 800, 200
LONGEST_QUESTION, LONGEST_ANSWER = 160, 320
"""Characters."""


def functions(source: str) -> Iterator[tuple[str, str]]:
    """Signature and docstring, and body, of the functions in a file."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or ast.get_docstring(node) is None:
            continue
        docstring = node.body[0]
        if docstring.lineno != docstring.end_lineno:
            continue
        whole = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
        count = docstring.end_lineno - node.lineno + 1
        parts = whole.splitlines(keepends=True)
        yield "".join(parts[:count]).rstrip("\n"), "\n" + "".join(parts[count:]).rstrip()


def main() -> None:
    """Write both files."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    found = {question: answer for file in corpus_files("train")
             for question, answer in functions(file.read_text(encoding="utf-8"))
             if len(question) <= LONGEST_QUESTION and len(answer) <= LONGEST_ANSWER}
    order = sorted(found, key=lambda question: hashlib.sha256(question.encode()).digest())
    print(f"{len(order)} functions below {corpus_root()}")
    taken = order[:NUM_CONVERSATIONS]
    _write(folder / "conversations.jsonl", [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": found[question]}]}
        for question in taken])
    _write(folder / "prompts.jsonl", [{"prompt": question} for question in order[len(taken):][:NUM_PROMPTS]])


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
