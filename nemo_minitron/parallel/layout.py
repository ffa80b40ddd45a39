"""`Layout`: parallel degrees, and whether they fit a model. Pure arithmetic."""

from __future__ import annotations

import dataclasses

from nemo_minitron.arch import ArchSpec
from nemo_minitron.errors import LayoutError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of tensor (tp), pipeline (pp) and data parallelism (dp); world size is their product."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    read_once: bool = dataclasses.field(default=True, compare=False)
    """Whether the first data-parallel replica reads a checkpoint and sends it to the others."""

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tp * self.pp * self.dp

    def check(self, arch: ArchSpec, *, name: str, seq_length: int | None = None) -> None:
        """Raise `LayoutError` unless the model called `name` can be cut into tp x pp shards."""
        for what, size in (("attention heads", arch.num_attention_heads), ("KV groups", arch.num_query_groups),
                           ("FFN neurons", arch.ffn_hidden_size)):
            if size % self.tp:
                raise LayoutError(f"tensor parallelism does not fit the {name}",
                                  expected=f"{size} {what} to be a multiple of tp", found=f"tp={self.tp}",
                                  key="parallel.tp")
        if arch.num_layers < self.pp:
            raise LayoutError(f"pipeline parallelism does not fit the {name}", found=f"pp={self.pp}",
                              expected=f"at most {arch.num_layers} stages, one for each layer", key="parallel.pp")
        if self.sequence_parallel and seq_length is not None and seq_length % self.tp:
            raise LayoutError("sequence parallelism does not fit the data",
                              expected=f"{seq_length} tokens a sample to be a multiple of tp", found=f"tp={self.tp}",
                              key="data.seq_length")

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers on each pipeline stage: as even as can be, the first stages have one more."""
        even, more = divmod(num_layers, self.pp)
        return tuple(even + (stage < more) for stage in range(self.pp))

    def check_world(self, world_size: int) -> None:
        """Raise `LayoutError` unless the running processes are as many as the layout asks for."""
        if world_size != self.world_size:
            raise LayoutError("the number of processes does not fit the layout",
                              expected=f"tp*pp*dp = {self.tp}*{self.pp}*{self.dp} = {self.world_size} processes",
                              found=str(world_size), key="parallel.dp")
