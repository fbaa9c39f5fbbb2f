"""The front door: a net and its targets in, `init`, `apply`, `merge` and `report` out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from lojax.adapters.create import check_key, create
from lojax.adapters.paths import flatten
from lojax.adapters.rule import DEFAULTS, Rule, as_rules
from lojax.adapters.targets import assign_rules, check_bias
from lojax.lowrank.merge import merge
from lojax.lowrank.strategy import checked_execution
from lojax.nets.adapted_module import AdaptedModule, as_module
from lojax.nets.detect import open_net
from lojax.nets.net import Net
from lojax.report.execution import Report, report
from lojax.rewrite.axis_inference import infer_axes
from lojax.rewrite.transform import trace_uses, transform


@dataclasses.dataclass(frozen=True)
class Model:
    """An adapted net. Holds no arrays of its own: every method is a pure function of its arguments."""

    net: Net
    rules: tuple[Rule, ...]
    full: tuple[Rule, ...]
    exclude: tuple[Rule, ...]
    strict: bool
    execution: str = "auto"
    bias: str = "none"

    def init(self, key: jax.Array, params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Splits ``params`` into ``(frozen, lora)`` with fresh adapters at the targets.

        Pure: works under `jit` and `eval_shape`.

        Args:
            key: A PRNG key; consumed.
            params: The net's parameters. Linen: the whole ``variables`` dict.
            *args: Example inputs, from which lojax sees how each weight is used. Shapes
                (`jax.ShapeDtypeStruct`) are enough. Without any, `lojax.adapters.axes.convention` holds.
            **kwargs: Likewise.

        Returns:
            ``(frozen, lora)``, both of the structure of ``params``, with None where the other tree
            (or neither) holds the leaf. ``lora`` has a `lojax.Adapter` at each target and a plain
            array at each parameter trained in full: every array leaf of it trains.

        Raises:
            ValueError: A target matches nothing, a rank is too large, or rules contradict.
        """
        check_key(key)
        self.net.check(params)
        apply_fn = self.net.apply if args or kwargs else None
        return _init(key, params, self.rules, self.full, self.exclude, self.bias, apply_fn, args, kwargs)

    def apply(self, frozen: Any, lora: Any, *args: Any, dropout_key: Any = None, **kwargs: Any) -> Any:
        """What the net returns, computed with the adapted weights.

        Args:
            frozen: The frozen tree. No gradient flows to it.
            lora: The trained tree. Differentiate with respect to this one.
            *args: What the net's own apply takes after its parameters; never traced by lojax.
            dropout_key: A PRNG key for dropout on the adapters' inputs; without one there is none.
            **kwargs: Likewise passed on (Linen: ``rngs=``, ``mutable=``, ``method=``).
        """
        adapted = transform(self.net.apply, strict=self.strict, execution=self.execution)
        return adapted(frozen, lora, *args, dropout_key=dropout_key, **kwargs)

    def merge(self, frozen: Any, lora: Any, *, donate: bool = False, check_finite: bool = False) -> Any:
        """Plain parameters for the net; see `lojax.merge`."""
        return merge(frozen, lora, donate=donate, check_finite=check_finite)

    def bind(self, params: Any) -> Any:
        """A net of the same kind that holds ``params`` (NNX, Equinox, HF Flax); for the others ``params`` itself."""
        return self.net.bind(params)

    def as_nnx(self, frozen: Any, lora: Any, *, rngs: nnx.Rngs | None = None) -> AdaptedModule:
        """The adapted NNX net as an `nnx.Module` whose trained arrays are `nnx.LoRAParam`.

        ``nnx.Optimizer(module, tx, wrt=nnx.LoRAParam)`` and trainers that take a module with such parameters
        work on it unchanged; ``module.pair()`` is the way back to ``(frozen, lora)``.

        Args:
            frozen: The frozen tree. Its arrays are shared, not copied.
            lora: The trained tree.
            rngs: Where the keys for dropout on the adapters' inputs come from; None for no such dropout.
        """
        return as_module(self.net, frozen, lora, strict=self.strict, execution=self.execution, rngs=rngs)

    @property
    def params(self) -> Any:
        """The parameters that the net holds, for the kinds of net that hold any."""
        return self.net.params

    def report(self, frozen: Any, lora: Any, *args: Any, **kwargs: Any) -> Report:
        """How each adapted weight is executed for these inputs (shapes are enough)."""
        uses = trace_uses(self.net.apply, frozen, lora, args, kwargs, execution=self.execution)
        return report(frozen, lora, uses)


def wrap(
    net: Any,
    targets: Any,
    *,
    rank: int = 8,
    alpha: float | None = None,
    scaling: str = "standard",
    init: str | Callable[..., Any] = "kaiming",
    dropout: float = 0.0,
    variant: str = "lora",
    train: Any = (),
    bias: str = "none",
    exclude: Any = (),
    axes: Sequence[str] | None = None,
    dtype: Any = None,
    strict: bool = False,
    execution: str = "auto",
) -> Model:
    """Adapts a net with LoRA, without touching it (Hu et al. 2021, arXiv:2106.09685).

    Args:
        net: A Flax Linen or NNX module, a transformed Haiku function, an Equinox module, a Flax model of
            Hugging Face transformers, or a function ``f(params, *args, **kwargs)``.
        targets: Which weights to adapt: a glob over paths (``**/`` crosses levels, ``{a,b}`` is either), a compiled
            regex (full match), a predicate ``(path, leaf) -> bool``, a `Rule`, or a sequence of these, where the
            first match wins. In a Linen ``variables`` dict globs and regexes stay in ``params``, unless they name
            another collection.
        rank: The rank ``r`` of the updates.
        alpha: The numerator of the scale ``alpha / r``; None means ``alpha = rank``.
        scaling: ``"standard"`` or ``"rslora"``.
        init: How ``a`` starts: ``"kaiming"``, ``"gaussian"``, or a function.
        dropout: The rate of dropout on the adapters' inputs.
        variant: The member of the LoRA family.
        train: Targets of parameters trained in full, such as a head. They win over a pattern in ``targets``.
        bias: Which biases train in full as well: ``"none"``, ``"all"``, or ``"lora_only"``, those beside an adapted
            weight. A bias is a parameter whose path ends in ``bias`` (or ``b``, as in Haiku).
        exclude: Targets that stay frozen whatever else matches them.
        axes: The role of each axis of the targets, instead of inference from use.
        dtype: The dtype of the adapters; None means float32.
        strict: Raise where a weight would have to be formed, instead of forming it.
        execution: How products with the weights are computed: ``"auto"``, ``"factored"``, ``"fused"`` or
            ``"materialize"``; see `lojax.transform`.

    Returns:
        A `Model` with ``init``, ``apply``, ``merge``, ``bind`` and ``report``.

    Raises:
        TypeError: ``net`` is of no known kind.
        ValueError: A setting is out of range.

    >>> import jax.numpy as jnp
    >>> model = wrap(lambda params, x: x @ params["kernel"], "kernel", rank=2, alpha=4)
    >>> frozen, lora = model.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, jnp.ones((1, 4)))
    >>> lora["kernel"].a.shape, lora["kernel"].b.shape, lora["kernel"].scale
    ((4, 2), (2, 3), 2.0)
    """
    rules, full, excluded = compile_rules(
        targets,
        train,
        exclude,
        rank=rank,
        alpha=alpha,
        scaling=scaling,
        init=init,
        dropout=dropout,
        variant=variant,
        axes=axes,
        dtype=dtype,
    )
    return Model(open_net(net), rules, full, excluded, strict, checked_execution(execution, strict), check_bias(bias))


def init(
    key: jax.Array,
    params: Any,
    targets: Any,
    *,
    apply_fn: Callable[..., Any] | None = None,
    example_args: Sequence[Any] = (),
    train: Any = (),
    bias: str = "none",
    exclude: Any = (),
    **settings: Any,
) -> tuple[Any, Any]:
    """`Model.init` without a wrapped model.

    Args:
        key: A PRNG key; consumed.
        params: A parameter tree.
        targets: As in `wrap`.
        apply_fn: ``apply_fn(params, *example_args)`` shows how the weights are used.
        example_args: Its inputs; shapes are enough.
        train: As in `wrap`.
        bias: As in `wrap`.
        exclude: As in `wrap`.
        **settings: ``rank``, ``alpha``, ``scaling``, ``init``, ``dropout``, ``variant``, ``axes``, ``dtype``.

    Returns:
        ``(frozen, lora)``.

    >>> import jax.numpy as jnp
    >>> frozen, lora = init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, "kernel", rank=2, alpha=4)
    >>> lora["kernel"].a.shape, lora["kernel"].b.shape, lora["kernel"].scale
    ((4, 2), (2, 3), 2.0)
    """
    check_key(key)
    rules, full, excluded = compile_rules(targets, train, exclude, **settings)
    return _init(key, params, rules, full, excluded, check_bias(bias), apply_fn, tuple(example_args), {})


def compile_rules(
    targets: Any, train: Any, exclude: Any, **settings: Any
) -> tuple[tuple[Rule, ...], tuple[Rule, ...], tuple[Rule, ...]]:
    """The rules that ``targets=``, ``train=`` and ``exclude=`` of `wrap` spell."""
    defaults = Rule((), **settings).fill(DEFAULTS)
    full, none = Rule((), train="full"), Rule((), train="none")
    return tuple(as_rules(targets, defaults)), tuple(as_rules(train, full)), tuple(as_rules(exclude, none))


def _init(
    key: jax.Array,
    params: Any,
    rules: Sequence[Rule],
    full: Sequence[Rule],
    exclude: Sequence[Rule],
    bias: str,
    apply_fn: Callable[..., Any] | None,
    args: Any,
    kwargs: Any,
) -> tuple[Any, Any]:
    plan = assign_rules(flatten(params), rules, full=full, exclude=exclude, bias=bias)
    unseen = [path for path, rule in plan.items() if rule.train in ("lora", "tokens") and rule.axes is None]
    seen = infer_axes(apply_fn, params, unseen, args, kwargs) if apply_fn and unseen else {}
    return create(key, params, plan, seen)
