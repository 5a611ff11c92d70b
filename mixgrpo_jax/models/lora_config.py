"""The settings of low-rank adapters, apart from `lora`: a config names them before it needs any of it."""

import dataclasses
import re
from dataclasses import dataclass

INITS = ("gaussian", "kaiming_uniform")
BASES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class LoraConfig:
    """What is adapted, and how.

    rank: the adapters' rank r; 0 trains all parameters instead.
    alpha: the adapters' product is scaled by alpha/r.
    targets: the regex that an adapted layer's whole path matches, as "double_blocks/image/attention/q"; "" takes the
      model family's own.
    init: how A starts: "gaussian" N(0, 1/r^2) or "kaiming_uniform" U(-1, 1)/sqrt(d_in), which are PEFT's "gaussian" and
      its default. B starts at zero, so that the adapted model starts as the base.
    base: the dtype of the frozen parameters, see `lora.freeze`.
    init_from: a LoRA file, a folder of one, or its name on the hub, that training starts from, see `lora_files.load`.
      Its rank must be r. Its alpha may be another: B is scaled, so that the policy starts as the file has it. The role
      "base" stays the model without adapters.
    """

    rank: int = 0
    alpha: float = 64.0
    targets: str = ""
    init: str = "gaussian"
    base: str = "bfloat16"
    init_from: str = ""

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"model.lora.rank={self.rank} must be positive, or 0 to train without adapters")
        if not self.alpha > 0:
            raise ValueError(f"model.lora.alpha={self.alpha} must be positive: the adapters are scaled by alpha/rank")
        for field, choices in (("init", INITS), ("base", BASES)):
            if getattr(self, field) not in choices:
                raise ValueError(f"model.lora.{field}={getattr(self, field)!r} is unknown: choose one of {choices}")
        if self.init_from and not self.rank:
            raise ValueError(
                f"model.lora.init_from={self.init_from!r} with model.lora.rank=0, which trains no adapters: set "
                "model.lora.rank to the file's"
            )
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"model.lora.targets={self.targets!r} is not a regular expression: {error}") from None

    @property
    def scale(self) -> float:
        """alpha/r."""
        return self.alpha / max(self.rank, 1)

    def on(self, targets: str) -> "LoraConfig":
        """The same, with a family's own targets where none are given."""
        return self if self.targets else dataclasses.replace(self, targets=targets)
