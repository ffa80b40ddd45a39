"""The command `minitron`: compose the recipe, run it, and turn errors into one line and an exit code."""

from __future__ import annotations

import sys
import traceback
import warnings
from importlib import import_module

from nemo_minitron.compose import load_config
from nemo_minitron.errors import ConfigError, UserError

USAGE = """\
usage: minitron [COMMAND] [experiment=NAME] [key=value ...]

  run                      do what is missing of the recipe (the default)
  config                   print the composed recipe and start nothing
  plan [format=json]       print what the recipe needs and costs (parameters, memory, FLOPs, GPU-hours), start nothing
  latency output=FILE [batch_size=N] [prompt_tokens=N] [new_tokens=N] [experiment=NAME] [key=value ...]
                           measure a search's layers on this device, for search.constraints.latency
  candidate rung=R [task=K] [experiment=NAME] [key=value ...]
                           train one candidate of a search, what a task of a Slurm job array runs
  status outputs/NAME [--json]
                           how far a run is: stages, progress, time left, jobs; from its files
  scores show PATH         print and plot what was measured, layer by layer
  scores diff A B          rank correlation of two scores, by axis and layer
  data prepare input=TEXT output=PREFIX tokenizer=DIR [json_key=text] [separator=S] [workers=N]
                           tokenize text or JSON lines into PREFIX.bin and PREFIX.idx, for data.path
  import megatron=DIR config=HF_DIR output=DIR
                           a Megatron or NeMo distributed checkpoint as a Hugging Face directory, for teacher.path
  export checkpoint=HF_DIR output=DIR [format=megatron|nemo]
                           and back
  generate checkpoint=DIR prompts=FILE.jsonl output=FILE.jsonl [max_new_tokens=N] [temperature=T] [top_p=P] [tp=N ...]
                           answers of a model to prompts; killed, the same command goes on

  minitron experiment=demo                      prune and distill the embedded teacher
  minitron experiment=demo parallel.tp=2        the same on two tensor-parallel processes
  minitron teacher.path=DIR data.path=TEXT prune.target.ffn_hidden_size=256
  minitron experiment=demo controls=[ce,scratch]

Keys are those of conf/config.yaml. Results: outputs/NAME/summary.json and outputs/NAME/report.html.
Exit codes: 0 done, 2 a mistake in the command or its inputs (one line says which), 1 anything else."""

TOOLS = {
    ("status",): "report.status:status",
    ("scores", "show"): "report.scores_command:show",
    ("scores", "diff"): "report.scores_command:diff",
    ("plan",): "stages.plan:plan",
    ("latency",): "latency_command:latency",
    ("candidate",): "pipeline:candidate",
    ("data", "prepare"): "data.command:prepare",
    ("import",): "checkpoint.command:import_command",
    ("export",): "checkpoint.command:export_command",
    ("generate",): "generate_command:generate",
}
"""Commands that are no recipe, and the function that takes the rest of the arguments; imported when asked for."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE)
        return 0
    warnings.simplefilter("ignore")  # those of libraries at import; our own lines are the ones to read
    try:
        _dispatch(arguments)
    except UserError as error:
        print(f"minitron: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minitron: interrupted; the same command goes on from here", file=sys.stderr)
        return 1
    except Exception as error:
        from nemo_minitron.launch.workers import WorkerError

        print(error if isinstance(error, WorkerError) else traceback.format_exc(), file=sys.stderr)
        return 1
    return 0


def _dispatch(arguments: list[str]) -> None:
    for words, function in TOOLS.items():
        if tuple(arguments[: len(words)]) == words:
            module, name = function.split(":")
            getattr(import_module(f"nemo_minitron.{module}"), name)(arguments[len(words) :])
            return
    command, overrides = "run", list(arguments)
    if overrides and "=" not in overrides[0]:
        command = overrides.pop(0)
    if command not in ("run", "config"):
        tools = ", ".join(" ".join(words) for words in TOOLS)
        raise ConfigError("unknown command", expected=f"run, config, {tools}, or key=value", found=repr(command))
    config = load_config(overrides)
    if command == "config":
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.create(config.to_dict())), end="")
        return
    from nemo_minitron.pipeline import run

    run(config, arguments)


if __name__ == "__main__":
    sys.exit(main())
