"""`minitron latency`: measures what `search.constraints.latency` reads, on the device at hand."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.arch import ArchSpec
from nemo_minitron.checkpoint.families import read_arch
from nemo_minitron.compose import load_config
from nemo_minitron.config import Config
from nemo_minitron.config_rounds import LatencyConfig
from nemo_minitron.errors import ConfigError
from nemo_minitron.search.latency import LatencyTable, Parts, Shape, fixed_sizes, shape_of
from nemo_minitron.search.recipe import candidates_of
from nemo_minitron.stages.initialize import initial_arch

SIZES = {"batch_size": 1, "prompt_tokens": 128, "new_tokens": 32, "turns": 5}


def latency(arguments: list[str]) -> None:
    """`output=FILE [batch_size=1] [prompt_tokens=128] [new_tokens=32] [turns=5] [experiment=NAME] [key=value ...]`.

    Measures every shape of layers among the candidates that the recipe's other constraints leave, and the source's.
    `train.precision` and `parallel.num_threads` are the recipe's.

    Raises:
        UserError: a bad argument, a recipe without a search, or more tokens than the model's context.
    """
    own = {"output": "", **{name: str(size) for name, size in SIZES.items()}}
    recipe = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in own:
            own[key] = value
        else:
            recipe.append(argument)
    if not own["output"]:
        raise ConfigError("missing argument", expected="output=FILE", found="none", key="output")
    config, sizes = load_config(recipe), {name: _positive(name, own[name]) for name in SIZES}
    if not config.search.is_set():
        raise ConfigError("nothing to measure", expected="a recipe with a search", found="none", key="search")
    source = _source(config)
    tokens = sizes["prompt_tokens"] + sizes["new_tokens"]
    if tokens > source.max_position_embeddings:
        raise ConfigError("longer than the model's context", found=str(tokens), key="prompt_tokens and new_tokens",
                          expected=f"at most {source.max_position_embeddings} tokens together")
    config.search.constraints.latency = LatencyConfig()
    candidates = candidates_of(source, config.search).candidates
    table = _measure(source, {shape_of(arch): arch for arch in (source, *candidates)}, sizes,
                     bf16=config.train.precision == "bf16-mixed", threads=config.parallel.num_threads)
    table.save(Path(own["output"]))
    print(f"[latency] {own['output']}: {len(table.shapes)} shapes; the source as a whole "
          f"{1000 * table.whole_s:.1f} ms, by its parts {1000 * table.seconds(source):.1f} ms")


def _measure(source: ArchSpec, archs: dict[Shape, ArchSpec], sizes: dict[str, int], *, bf16: bool,
             threads: int | None) -> LatencyTable:
    from nemo_minitron.parallel.cpu import open_cpu_door

    open_cpu_door()
    import torch

    from nemo_minitron.generate.latency import Load, layer_and_rest, whole
    from nemo_minitron.parallel import groups

    if threads is not None:
        torch.set_num_threads(threads)
    groups.start_alone()
    groups.seed_everything(0)
    turns = sizes["turns"]
    load = Load(**{name: size for name, size in sizes.items() if name != "turns"})
    shapes: dict[Shape, Parts] = {}
    try:
        for number, (shape, arch) in enumerate(archs.items(), 1):
            shapes[shape] = layer_and_rest(arch, load, bf16=bf16, turns=turns)
            print(f"[latency] {number}/{len(archs)}  hidden {shape[0]}, FFN {shape[1]}, {shape[2]} heads, {shape[3]} "
                  f"groups: {1000 * shapes[shape].layer_s:.3f} ms a layer, {1000 * shapes[shape].rest_s:.3f} ms the "
                  "rest", flush=True)
        whole_s = whole(source, load, bf16=bf16, turns=turns)
    finally:
        groups.stop()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    conditions = {"device": device, "precision": "bf16" if bf16 else "fp32", "threads": torch.get_num_threads(),
                  **sizes}
    return LatencyTable(fixed=fixed_sizes(source), conditions=conditions, shapes=shapes, whole_s=whole_s)


def _source(config: Config) -> ArchSpec:
    if config.teacher.path is None:
        return initial_arch(config.model)
    return read_arch(Path(config.teacher.path))


def _positive(name: str, value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise ConfigError("bad value", expected="a positive whole number", found=repr(value), key=name)
    return int(value)
