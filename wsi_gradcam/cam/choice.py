"""Which engine and precision explain a run: asked for, or the fastest that keeps the maps. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

AUTO = "auto"
ENGINES = ("eager", "compile", "openvino")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Trial:
    """How an engine did in a precision, on patches of the run.

    Attributes:
        patches_per_s: explained patches; None where it could not run or was ruled out before it was timed.
        pearson: the lowest correlation of a map with eager float32's; None where not checked.
        same_peak: share of maps whose highest cell is float32's too.
        peak_risk: expected share of maps, among many, whose highest cell would be another.
        remark: why it was not taken.
    """

    engine: str
    precision: str
    patches_per_s: float | None = None
    pearson: float | None = None
    same_peak: float | None = None
    peak_risk: float | None = None
    remark: str = ""


@dataclass(frozen=True)
class Choice:
    """The engine and precision of a run, the same on every worker and after every resume."""

    engine: str
    precision: str
    trials: tuple[Trial, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The choice as plain values."""
        return {**asdict(self), "trials": [asdict(trial) for trial in self.trials]}

    @classmethod
    def from_json(cls, values: Any) -> Choice:
        """The choice that `to_json` gave; raises KeyError or TypeError for other values."""
        return cls(values["engine"], values["precision"], tuple(Trial(**trial) for trial in values["trials"]))
