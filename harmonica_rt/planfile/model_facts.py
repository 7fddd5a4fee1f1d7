"""Collects the properties of a model that a saved plan is checked against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from harmonica_rt.model.tensors import named_tensors, plain_tensors
from harmonica_rt.planfile.values import Devices


@dataclass(frozen=True)
class ModelFacts:
    """The properties of a model, at one time, that a saved plan is checked against.

    Attributes:
        model: the model.
        tensors: its parameters and buffers by name.
        attributes: its plain tensors (neither parameters nor buffers) by name.
        modules: the paths of its modules, including every path of a module that appears in several places.
        devices: the devices of its tensors.
    """

    model: nn.Module
    tensors: Mapping[str, torch.Tensor]
    attributes: Mapping[str, torch.Tensor]
    modules: frozenset[str]
    devices: Devices

    @classmethod
    def of(cls, model: nn.Module) -> ModelFacts:
        """These properties of a model as it is now.

        Raises:
            PlanFileError: its tensors lie on several devices of one type.
        """
        tensors = named_tensors(model)
        modules = frozenset(path for path, _ in model.named_modules(remove_duplicate=False))
        return cls(model, tensors, plain_tensors(model), modules, Devices(tensors.values()))
