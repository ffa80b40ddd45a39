"""Tokens a second of teacher and student, by our own decoding and by llama.cpp, and whether both say the same.

    pip install --target /tmp/client xllamacpp sentencepiece gguf protobuf      # llama.cpp as a wheel
    pip download --no-deps --no-binary :all: llama-cpp-python                   # its source holds convert_hf_to_gguf.py
    python benchmarks/serving.py outputs/stories --client /tmp/client --converter .../llama.cpp/convert_hf_to_gguf.py

Both decode greedily, in fp32, one thread, `--batch` prompts at once by ours (llama.cpp: one at a time; ours is timed so
too). Teacher and student take turns; seconds are medians of `--turns`, prefill included. Without `--client` llama.cpp
is left out. llama.cpp's converter reads the exported Hugging Face directory as it is: there is no step between.

JSON, for teacher and student: `tokens_per_s` at the batch, `tokens_per_s_alone` (one prompt at a time),
`llama_cpp_tokens_per_s`; `same_text`: the share of prompts that llama.cpp continues with
the same text, but for blanks at its ends;
`speedup`: student over teacher, of each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import depth_scan  # noqa: F401  (opens the CPU door)

# isort: split
import torch

from nemo_minitron.artifacts import write_json
from nemo_minitron.checkpoint.digest import read_checkpoint
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.generate.decode import generate
from nemo_minitron.generate.prompts import encode_prompt
from nemo_minitron.generate.sampling import Sampling
from nemo_minitron.generate.stopping import StopAt
from nemo_minitron.model.build import load_model, transformer_config
from nemo_minitron.parallel import groups
from nemo_minitron.parallel.layout import Layout

PROMPTS = ("Once upon a time", "One day, a little girl", "The dog was very", "Tom and his mom went to",
           "In the park there was", "Lily had a big red", "A boy named Tim", "It was a sunny day and")

CLIENT = """
import json, statistics, sys, time
import xllamacpp
path, prompts, new, turns = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.cpuparams.n_threads = path, 512, 1, 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
def ask(prompt):
    return server.handle_completions({"prompt": prompt, "n_predict": new, "temperature": 0.0, "cache_prompt": False})
answers, rates = [ask(prompt) for prompt in prompts], []
for _ in range(turns):
    started = time.monotonic()
    tokens = sum(ask(prompt)["usage"]["completion_tokens"] for prompt in prompts)
    rates.append(tokens / (time.monotonic() - started))
print(json.dumps({"rate": statistics.median(rates), "texts": [answer["choices"][0]["text"] for answer in answers]}))
"""


class Ours:
    """A model in this process, and the continuations of the prompts by it."""

    def __init__(self, directory: Path, prompts: list[str], new_tokens: int) -> None:
        checkpoint = read_checkpoint(directory)
        self.layout = Layout()
        self.tokenizer = load_tokenizer(directory)
        self.stop = StopAt(self.tokenizer)
        self.model = load_model(checkpoint.arch, checkpoint.path, transformer_config(checkpoint.arch, self.layout))
        self.prompts = [encode_prompt({"prompt": prompt}, self.tokenizer) for prompt in prompts]
        self.sampling = Sampling(max_new_tokens=new_tokens)

    def run(self, batch: int) -> tuple[float, list[str]]:
        """New tokens a second, and the texts."""
        started = time.monotonic()
        with torch.inference_mode():
            found = generate(self.model, self.prompts, self.sampling, self.stop, layout=self.layout,
                             micro_batch_size=batch)
        rate = sum(len(tokens) for tokens in found) / (time.monotonic() - started)
        return rate, [self.stop.cut(tokens) for tokens in found]


def llama_cpp(directory: Path, arguments: argparse.Namespace, prompts: list[list[int]], folder: Path) -> dict[str, Any]:
    """What llama.cpp makes of the directory: tokens a second and texts."""
    path = folder / f"{directory.parent.name}-{directory.name}.gguf"
    environment = os.environ | {"PYTHONPATH": str(arguments.client)}
    convert = [sys.executable, str(arguments.converter), str(directory), "--outfile", str(path), "--outtype", "f32"]
    subprocess.run(convert, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, str(path), json.dumps(prompts), str(arguments.new_tokens), str(arguments.turns)],
        env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure both models of a run both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="outputs/NAME with a distilled model")
    parser.add_argument("--client", type=Path, help="folder that xllamacpp, gguf and sentencepiece are installed in")
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--prompts", type=Path, help="text, a prompt a line; default: beginnings of stories")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/serving.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    groups.start_alone()
    prompts = arguments.prompts.read_text(encoding="utf-8").splitlines() if arguments.prompts else list(PROMPTS)
    (entry,) = json.loads((arguments.run / "summary.json").read_text(encoding="utf-8"))["rounds"]
    directories = {name: Path(entry[name]["path"]) for name in ("teacher", "distilled")}
    models = {name: Ours(path, prompts, arguments.new_tokens) for name, path in directories.items()}
    texts = {name: model.run(arguments.batch)[1] for name, model in models.items()}
    rates: dict[str, dict[str, list[float]]] = {name: {"tokens_per_s": [], "tokens_per_s_alone": []} for name in models}
    for _ in range(arguments.turns):
        for name, model in models.items():
            rates[name]["tokens_per_s"].append(model.run(arguments.batch)[0])
            rates[name]["tokens_per_s_alone"].append(model.run(1)[0])
    found: dict[str, dict[str, Any]] = {name: {"num_parameters": entry[name]["num_parameters"]} for name in models}
    for name, of in rates.items():
        found[name] |= {key: round(statistics.median(values), 1) for key, values in of.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in directories.items() if arguments.client else []:
            served = llama_cpp(path, arguments, models[name].prompts, Path(folder))
            same = [ours.strip() == theirs.strip() for ours, theirs in zip(texts[name], served["texts"], strict=True)]
            found[name] |= {"llama_cpp_tokens_per_s": round(served["rate"], 1), "same_text": sum(same) / len(same)}
    keys = [key for key in found["distilled"] if "tokens_per_s" in key]
    record = {**found, "speedup": {key: round(found["distilled"][key] / found["teacher"][key], 3) for key in keys},
              "prompts": len(prompts), "new_tokens": arguments.new_tokens, "batch": arguments.batch}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, record)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
