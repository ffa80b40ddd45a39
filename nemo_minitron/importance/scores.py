"""`Scores`: what the calibration pass measured, independent of any target and any parallel layout.

Two files in one directory: `scores.safetensors` (float64 tensors, global sizes) and `scores.json` (what they
mean). Pure: numpy only. Collecting the activations is in `hooks`, turning sums into importance in `aggregate`.

Shape letters: L layers, H hidden, F ffn, N query heads, G query groups.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from nemo_minitron import artifacts
from nemo_minitron.arch import ArchSpec
from nemo_minitron.errors import ScoresError

SCHEMA_VERSION = 2
WIDTH_AXES = ("hidden", "ffn", "heads", "groups")
AXES = (*WIDTH_AXES, "layers")
SEQUENCE_STATISTICS = ("mean", "l2", "var")
MOMENTS = ("sum", "sum_of_squares")
BLOCK_INFLUENCE = "layers.block_influence"
REMOVAL_ORDER = "layers.logit_mse.removal_order"
DEPTH_METRICS = ("loss", "accuracy", "logit_mse")
STATIC_METHODS = ("magnitude", "random", "iterative")
"""Importance that is a number per unit already: no statistic of activations is aggregated."""
DEFAULT_AGGREGATION = {"batch": "l2", "sequence": "mean"}
"""Best of the nine combinations on the 8T validation set in arXiv:2407.14679, Table 11."""

TENSORS_FILE = "scores.safetensors"
HEADER_FILE = "scores.json"


def width_shape(arch: ArchSpec, axis: str) -> tuple[int, int]:
    """Rows and units of what is measured on a width axis.

    hidden [2L + 1, H]: input norm and pre-MLP norm of each layer in order, then the final norm; ffn [L, F]; heads
    [L, N] and groups [L, G] (norms of each token's output); head_channels [L, N * D] (channels of the heads' outputs).
    """
    sizes = {"hidden": arch.hidden_size, "ffn": arch.ffn_hidden_size, "heads": arch.num_attention_heads,
             "groups": arch.num_query_groups, "head_channels": arch.num_attention_heads * arch.head_dim}
    return 2 * arch.num_layers + 1 if axis == "hidden" else arch.num_layers, sizes[axis]


def tensor_shapes(arch: ArchSpec) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor that `Scores` of `arch` may hold, by name."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{axis}.{statistic}.{moment}": width_shape(arch, axis)
        for axis in (*WIDTH_AXES, "head_channels") for statistic in SEQUENCE_STATISTICS for moment in MOMENTS
    }
    shapes[BLOCK_INFLUENCE] = shapes[REMOVAL_ORDER] = (arch.num_layers,)
    for metric in DEPTH_METRICS:
        shapes[f"layers.{metric}.0"] = (1,)
        shapes.update({f"layers.{metric}.{length}": (arch.num_layers - length + 1,)
                       for length in range(1, arch.num_layers)})
    for method in STATIC_METHODS:
        shapes.update({f"{axis}.{method}": (1 if axis == "hidden" else arch.num_layers, width_shape(arch, axis)[1])
                       for axis in WIDTH_AXES})
        shapes[f"layers.{method}"] = (arch.num_layers,)
    return shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What was measured, by name: float64, global.

    With a_1..a_S the activations of one unit at the S tokens of one sample, the sequence statistics are

    - mean: `(1/S) * sum_s |a_s|` (of absolute values),
    - l2:   `sqrt(sum_s a_s^2)` (no denominator),
    - var:  `(1/S) * sum_s (a_s - abar)^2` with abar the signed mean over the same S tokens.

    `{axis}.{statistic}.sum` and `.sum_of_squares` add such a statistic and its square over all `num_samples`
    samples, shaped as `width_shape` says. Of the heads either `head_channels` is there (every channel of the heads'
    outputs) or `heads` and `groups` (the norm of each token's output, of a head and of all heads of a group).

    `layers.block_influence` [L] is already a mean over all calibration tokens. `layers.{metric}.{k}` [L - k + 1] is
    the model without layers i to i+k-1: loss (nats/token), accuracy (fraction of a task file's questions) or
    logit_mse (sum of squared differences of the logits over the sum of the whole model's squares);
    `layers.{metric}.0` [1] is the whole model's. `layers.logit_mse.removal_order` [L] counts from 0 which layer went
    first when one after another was removed; the layer that stayed last has L - 1.

    `{axis}.magnitude`, `.random` and `.iterative` are importance per unit as it is, [rows, units] (hidden: one row),
    `layers.*` [L]. What was not collected is absent. `measures` says per axis what was measured; `samples_digest`
    identifies the calibration tokens and `source_digest` the weights of the scored checkpoint.
    """

    source: ArchSpec
    num_samples: int
    samples_digest: str
    source_digest: str
    measures: dict[str, str]
    tensors: dict[str, npt.NDArray[np.float64]]

    def check(self) -> Scores:
        """Return self.

        Raises:
            ScoresError: no samples, or a tensor with an unknown name, the wrong shape or dtype, or values
                that are NaN or infinite; sums without their squares.
        """
        if not isinstance(self.num_samples, int) or self.num_samples < 1:
            raise ScoresError("bad scores", expected="at least one calibration sample", found=repr(self.num_samples))
        shapes = tensor_shapes(self.source)
        for name, tensor in self.tensors.items():
            if name not in shapes:
                raise ScoresError("unknown score tensor", expected="one of " + ", ".join(shapes), found=name)
            if tensor.shape != shapes[name]:
                raise ScoresError(f"score tensor {name} does not fit the model", expected=f"shape {shapes[name]}",
                                  found=f"shape {tensor.shape}")
            if tensor.dtype != np.float64:
                raise ScoresError(f"score tensor {name}", expected="float64", found=str(tensor.dtype))
            num_bad = tensor.size - int(np.isfinite(tensor).sum())
            if num_bad:
                raise ScoresError(f"score tensor {name}", expected="finite values only",
                                  found=f"{num_bad} of {tensor.size} NaN or infinite")
            stem, _, moment = name.rpartition(".")
            other = MOMENTS[1 - MOMENTS.index(moment)] if moment in MOMENTS else None
            if other and f"{stem}.{other}" not in self.tensors:
                raise ScoresError(f"score tensor {name} stands alone", expected=f"{stem}.{other} beside it",
                                  found="none")
        return self

    def axes(self) -> tuple[str, ...]:
        """The axes that were collected, in a fixed order."""
        collected = {name.split(".")[0] for name in self.tensors}
        if "head_channels" in collected:
            collected |= {"heads", "groups"}
        return tuple(axis for axis in AXES if axis in collected)

    def statistics(self) -> tuple[str, ...]:
        """The sequence statistics that were collected for at least one axis, in a fixed order."""
        collected = {name.split(".")[1] for name in self.tensors}
        return tuple(statistic for statistic in SEQUENCE_STATISTICS if statistic in collected)

    def digest(self) -> str:
        """SHA-256 (hex) of the content of `scores.safetensors`."""
        return hashlib.sha256(self._tensor_bytes()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write `scores.safetensors`, then `scores.json`, each atomically, into `directory`.

        Raises:
            ScoresError: as `check`.
        """
        self.check()
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / f".{TENSORS_FILE}.{os.getpid()}"
        with open(temporary, "wb") as file:
            file.write(self._tensor_bytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, directory / TENSORS_FILE)
        artifacts.write_json(directory / HEADER_FILE, self._header())

    @classmethod
    def load(cls, directory: Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            ScoresError: a file is missing or unreadable, the schema is another one, the two files do not belong
                together, or as `check`.
        """
        if not (directory / HEADER_FILE).is_file():
            raise ScoresError("no scores", expected=f"{HEADER_FILE} in {directory}", found="none")
        header = artifacts.read_json(directory / HEADER_FILE)
        version = header.get("schema_version") if isinstance(header, dict) else None
        if version != SCHEMA_VERSION:
            raise ScoresError(f"cannot read {directory / HEADER_FILE}", expected=f"schema_version {SCHEMA_VERSION}",
                              found=repr(version))
        try:
            content = (directory / TENSORS_FILE).read_bytes()
            tensors = safetensors.numpy.load(content)
        except (OSError, safetensors.SafetensorError) as error:
            raise ScoresError("cannot read score tensors", expected=f"{TENSORS_FILE} in {directory}",
                              found=str(error)) from None
        try:
            scores = cls(source=ArchSpec.from_dict(header["source"]), num_samples=header["num_samples"],
                         samples_digest=header["samples_digest"], source_digest=header["source_digest"],
                         measures=dict(header["measures"]), tensors=tensors)
            expected_digest = header["tensors_digest"]
        except (KeyError, TypeError) as error:
            raise ScoresError(f"cannot read {directory / HEADER_FILE}", found=repr(error),
                              expected=f"the fields of schema {SCHEMA_VERSION}") from None
        if hashlib.sha256(content).hexdigest() != expected_digest:
            raise ScoresError(f"{TENSORS_FILE} and {HEADER_FILE} in {directory} do not belong together",
                              expected=f"digest {expected_digest}", found="another")
        return scores.check()

    def _header(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.source.to_dict(),
            "num_samples": self.num_samples,
            "samples_digest": self.samples_digest,
            "source_digest": self.source_digest,
            "measures": self.measures,
            "default_aggregation": DEFAULT_AGGREGATION,
            "axes": list(self.axes()),
            "statistics": list(self.statistics()),
            "tensors_digest": self.digest(),
        }

    def _tensor_bytes(self) -> bytes:
        return safetensors.numpy.save({name: np.ascontiguousarray(tensor) for name, tensor in self.tensors.items()})


def scores_digest(directory: Path) -> str:
    """SHA-256 (hex) of the files of scores, without reading what they say.

    Raises:
        ScoresError: there are none.
    """
    files = [directory / HEADER_FILE, directory / TENSORS_FILE]
    if not all(file.is_file() for file in files):
        raise ScoresError("no scores", expected=f"{HEADER_FILE} and {TENSORS_FILE} in {directory}", found="none",
                          key="prune.scores")
    return artifacts.digest_files(files)
