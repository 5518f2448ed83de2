"""Tensors that follow from the options of a module: moved with it, neither learned nor saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class WithConstants(nn.Module):
    """A module with such tensors, as buffers that are not saved.

    They are made anew whenever weights are loaded: else a module that was built on the meta device
    would have none after `load_state_dict(assign=True)`, and numbers at random after `to_empty`.

    Example:
        >>> import torch
        >>> class Ramp(WithConstants):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.make_constants()
        ...     def constants(self) -> Mapping[str, Tensor]:
        ...         return {"steps": torch.arange(3)}
        >>> with torch.device("meta"):
        ...     ramp = Ramp()
        >>> _ = ramp.to_empty(device="cpu").load_state_dict({})
        >>> ramp.steps.tolist()
        [0, 1, 2]
    """

    def constants(self) -> Mapping[str, Tensor]:
        """Names and tensors, by the options alone."""
        raise NotImplementedError

    def make_constants(self) -> None:
        """Register them; to be called by a constructor when the options are set."""
        for name, made in self.constants().items():
            self.register_buffer(name, made, persistent=False)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any, **options: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **options)
        with torch.inference_mode(False):  # who loads weights in it may train later
            for name, made in self.constants().items():
                before = self.get_buffer(name)
                device = before.device
                if device.type == "meta":  # then weights may have been assigned
                    device = next((x.device for x in state_dict.values()), device)
                dtype = before.dtype if before.is_floating_point() else made.dtype
                self.register_buffer(name, made.to(device, dtype), persistent=False)
