"""A Flax model of Hugging Face transformers as a net. Its parameter tree is ``model.params``."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from lojax.adapters.paths import flatten
from lojax.nets.params_check import Method, call_method, check_params
from lojax.types import Params, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class TransformersNet:
    """A ``FlaxPreTrainedModel``. Nothing of transformers is imported."""

    model: Any
    state_paths = frozenset()
    kind = "a Hugging Face model"

    @property
    def name(self) -> str:
        """The name of its class."""
        return type(self.model).__name__

    @property
    def params(self) -> Params:
        """The parameters of the model."""
        if not self.model._is_initialized:
            raise AttributeError(
                f"This {self.name} was made with _do_init=False and holds no parameters: pass those "
                "that came with it to init and apply."
            )
        return self.model.params

    def check(self, params: Params) -> None:
        """Raises unless ``params`` fits the model."""
        if self.model._is_initialized:
            check_params(params, flatten(self.model.params), f"the model {self.name}")

    def bind(self, params: Params) -> Any:
        """A copy of the model that holds ``params`` and shares everything else."""
        self.check(params)
        bound = copy.copy(self.model)
        # Not through the setter of ``model.params``, which refuses on a model made with _do_init=False.
        bound._params, bound._is_initialized = params, True
        return bound

    def apply(self, params: Params, /, *args: object, method: Method = None, **kwargs: object) -> PyTree:
        """What the model returns; ``method`` is the name of one that takes ``params=``, such as ``"decode"``."""
        self.check(params)
        return call_method(self.model, method, args, {**kwargs, "params": params})

    observe = apply
