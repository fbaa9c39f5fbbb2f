"""The front door: a net and its targets in, `init`, `apply`, `merge` and `report` out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from flax import nnx

from lojax.adapters.bank import Bank
from lojax.adapters.bank_shapes import drop_full, widest_shapes
from lojax.adapters.create import check_key, create
from lojax.adapters.leaves import check_leaf
from lojax.adapters.paths import flatten
from lojax.adapters.rule import DEFAULTS, Rule, Target, as_rules, explain_unknown_arguments
from lojax.adapters.targets import assign_rules, check_bias
from lojax.lowrank.merge import merge
from lojax.lowrank.strategy import check_execution
from lojax.nets.adapted_module import AdaptedModule, as_module
from lojax.nets.detect import as_net
from lojax.nets.named_axes import bind_named_axes
from lojax.nets.net import Net
from lojax.nets.nnx import NNXNet
from lojax.report.execution import Report, report
from lojax.report.summary import Summary, summary
from lojax.rewrite.axis_inference import infer_axes
from lojax.rewrite.batch_axes import BatchAxes
from lojax.rewrite.evaluate import trace_abstractly
from lojax.rewrite.mixed_batch import mixed_batch
from lojax.rewrite.transform import trace_uses, transform
from lojax.text import check_flags
from lojax.types import Dtype, Key, Leaf, Params, Path, PyTree

Targets: TypeAlias = Target | Rule | Sequence[Target | Rule]
"""Which parameters: a glob, a compiled regex, a predicate ``(path, leaf) -> bool``, a `Rule`, or several of these."""


@dataclasses.dataclass(frozen=True)
class Model:
    """An adapted net. It holds no adapters: every method is a pure function of its arguments."""

    net: Net
    rules: tuple[Rule, ...]
    full: tuple[Rule, ...]
    exclude: tuple[Rule, ...]
    strict: bool
    execution: str = "auto"
    bias: str = "none"

    def init(self, key: Key, params: Params, *args: object, **kwargs: object) -> tuple[Params, Params]:
        """Splits ``params`` into ``(frozen, lora)`` with fresh adapters at the targets.

        Pure: works under `jit` and `eval_shape`.

        Args:
            key: A PRNG key; consumed.
            params: The net's parameters. Linen: the whole ``variables`` dict.
            *args: Example inputs, from which lojax sees how each weight is used. Shapes
                (`jax.ShapeDtypeStruct`) are enough. Without any, axes follow `lojax.adapters.axes.convention`.
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
        leaves = {path: leaf for path, leaf in _leaves(params).items() if path not in self.net.state_paths}
        rule_of = assign_rules(leaves, self.rules, full=self.full, exclude=self.exclude, bias=self.bias)
        return _create(key, params, rule_of, self.net.observe if args or kwargs else None, args, kwargs)

    def preview(self, params: Params, *args: object, **kwargs: object) -> Summary:
        """What `init` would adapt and train, as the `lojax.summary` of it, without making anything.

        Args:
            params: As in `init`; shapes (`jax.ShapeDtypeStruct`) are enough.
            *args: As in `init`.
            **kwargs: Likewise.

        Returns:
            A `Summary`: ``print(model.preview(params))`` shows every parameter, ``.text(frozen=False)`` what trains.
        """

        def start(params: Params, args: Sequence[object], kwargs: Mapping[str, object]) -> tuple[Params, Params]:
            return self.init(jax.random.key(0), params, *args, **kwargs)

        return summary(*trace_abstractly(start, params, args, kwargs))

    def apply(
        self,
        frozen: Params,
        lora: Params | Bank | None,
        *args: object,
        dropout_key: Key | None = None,
        adapter: Any = None,
        active: Any = None,
        batch_axes: BatchAxes = 0,
        check_rows: bool = True,
        **kwargs: object,
    ) -> PyTree:
        """What the net returns, computed with the adapted weights.

        With a `lojax.Bank` and ``adapter=``, each row of the batch has its own adapter. Each row is computed as a batch
        of one, with one program and one product of all rows for each frozen weight, so the net must not let rows meet
        (batch statistics in training, experts of limited capacity). A single PRNG key among the arguments is folded
        with the number of the row.

        Args:
            frozen: The frozen tree. No gradient flows to it.
            lora: The trained tree. Differentiate with respect to this one. A `lojax.Bank` where ``adapter=`` says which
                row uses which adapter. None for the base alone, ``frozen`` as it is.
            *args: What the net's own apply takes after its parameters; never traced by lojax.
            dropout_key: A PRNG key for dropout on the adapters' inputs; without one there is no such dropout.
            adapter: Integers ``[batch]``, the number of the adapter of each row, or their names; -1 (or None among
                names) is the base alone. Or floats ``[batch, N]``, the weights of the N updates for each row. A single
                number or name is the adapter of the whole batch. Under `jit`, where numbers cannot be checked, one out
                of range gives NaN.
            active: ``bool [batch, T]``, the tokens on which the adapters act; None for all. A row is then computed by
                itself, as with ``adapter=``, which it may go with. On the other tokens each adapted product is that of
                the base, bit for bit, so tokens before the first active one leave the keys and values of the base.
            batch_axes: Where the rows are in the arguments, with ``adapter=``: an axis; or one for each positional
                argument; or a dict by position or keyword, 0 for what is not in it. None is an argument that all rows
                share, and in place of an axis there may be a tree of axes for an argument that is a tree. Scalars are
                shared. ``"cache"`` names the cache in a Linen net's variables, where its axes are not plain to see.
                Where they are in the outputs is found by a trace.
            check_rows: Whether to refuse a net in which rows meet, with ``adapter=``, as far as a trace shows it.
            **kwargs: Passed on as well (Linen: ``rngs=``, ``mutable=``, ``method=``; NNX: ``mutable=``, ``state=``,
                ``method=``, see `lojax.nets.nnx.NNXNet.apply`).
        """
        net = lambda params, *args, **kwargs: self.net.apply(params, *args, **kwargs)
        net.__name__ = net.__qualname__ = self.net.name  # tracer errors and profiles show it
        adapted = transform(net, strict=self.strict, execution=self.execution)
        choice = {"adapter": adapter, "active": active, "batch_axes": batch_axes, "check_rows": check_rows}
        return adapted(frozen, lora, *args, dropout_key=dropout_key, **choice, **kwargs)

    def merge(
        self,
        frozen: Params,
        lora: Params,
        *,
        donate: bool = False,
        check_finite: bool = False,
        requantize: bool = False,
    ) -> Params:
        """Parameters for the net, plain ones unless ``requantize``; see `lojax.merge`."""
        return merge(frozen, lora, donate=donate, check_finite=check_finite, requantize=requantize)

    def bind(self, params: Params, *, state: PyTree = None) -> Any:
        """A net of the same kind that holds ``params`` (NNX, Equinox, HF Flax); for the others ``params`` itself.

        Args:
            params: The parameters: what `merge` returns, for one.
            state: For an NNX net: what ``apply(..., mutable=...)`` returned, or a part of it. It takes the place of the
                batch statistics and the like in ``params``, and of the rng streams, which are otherwise as they were
                when the net was wrapped.
        """
        if state is None:
            return self.net.bind(params)
        if not isinstance(self.net, NNXNet):
            raise TypeError(f"bind(state=...) is for NNX modules, and this net is {self.net.kind}. Leave state out.")
        return self.net.bind(params, state)

    def as_nnx(self, frozen: Params, lora: Params, *, rngs: nnx.Rngs | None = None) -> AdaptedModule:
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
    def params(self) -> Params:
        """The parameters that the net holds. A net that holds none raises `AttributeError`."""
        return self.net.params

    def report(
        self,
        frozen: Params,
        lora: Params | Bank,
        *args: object,
        adapter: Any = None,
        active: Any = None,
        batch_axes: BatchAxes = 0,
        check_rows: bool = True,
        **kwargs: object,
    ) -> Report:
        """How each adapted weight is executed for these inputs (shapes are enough); ``adapter=`` as in `apply`."""
        mixed = mixed_batch(lora, adapter, active, batch_axes, check_rows)
        observe = bind_named_axes(self.net.observe)
        if mixed is None:
            return report(frozen, lora, trace_uses(observe, frozen, lora, args, kwargs, execution=self.execution))
        uses = trace_uses(observe, frozen, mixed.bank, args, kwargs, execution=self.execution, mixed=mixed)
        return report(drop_full(frozen, mixed.bank.lora), widest_shapes(mixed.bank), uses)


@explain_unknown_arguments
def wrap(
    net: Any,
    targets: Targets,
    *,
    rank: int = 8,
    alpha: float | None = None,
    scaling: str = "standard",
    init: str | Callable[..., Any] = "kaiming",
    dropout: float = 0.0,
    variant: str = "lora",
    train: Targets = (),
    bias: str = "none",
    exclude: Targets = (),
    axes: Sequence[str] | None = None,
    dtype: Dtype | None = None,
    base: str | None = None,
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
        rank: The rank ``r`` of the updates; lowered for a weight whose min(m, n) is below it, and the summary says so.
        alpha: The numerator of the scale ``alpha / r``; None means ``alpha = rank``.
        scaling: ``"standard"`` or ``"rslora"``.
        init: How the adapters start: ``"kaiming"``, ``"gaussian"``, or a function for ``a``; ``"pissa"``, ``"loftq"``
            and others for both factors, see `Rule`.
        dropout: The rate of dropout on the adapters' inputs.
        variant: The member of the LoRA family.
        train: Targets of parameters trained in full, such as a head. They win over a pattern in ``targets``.
        bias: Which biases train in full as well: ``"none"``, ``"all"``, or ``"lora_only"`` (those beside an adapted
            weight). A bias is a parameter whose path ends in ``bias`` (or ``b``, as in Haiku).
        exclude: Targets that stay frozen whatever else matches them.
        axes: The role of each axis of the targets, instead of inference from use.
        dtype: The dtype of the adapters; None means float32.
        base: ``"nf4"``, ``"int4"``, ``"int8"`` or ``"float8_e4m3fn"``: ``init`` takes float parameters and quantizes
            the adapted weights in ``frozen``, and no others, as `lojax.quantize` does. A start that takes its part
            out of the weight does so before. None leaves the weights as they are.
        strict: Raise where a weight would have to be materialized, instead of materializing it.
        execution: How products with the weights are computed: ``"auto"``, ``"factored"``, ``"fused"``,
            ``"kernel"`` or ``"materialize"``; see `lojax.transform`.

    Returns:
        A `Model` with ``init``, ``apply``, ``merge``, ``bind`` and ``report``.

    Raises:
        TypeError: ``net`` is of no known kind, or a setting of the wrong type.
        ValueError: A setting is out of range.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> model = wrap(lambda params, x: x @ params["kernel"], "kernel", rank=2, alpha=4)
    >>> frozen, lora = model.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, jnp.ones((1, 4)))
    >>> lora["kernel"].a.shape, lora["kernel"].b.shape, lora["kernel"].scale
    ((4, 2), (2, 3), 2.0)
    """
    check_flags(strict=strict)
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
        base=base,
    )
    return Model(as_net(net), rules, full, excluded, strict, check_execution(execution, strict), check_bias(bias))


@explain_unknown_arguments
def init(
    key: Key,
    params: Params,
    targets: Targets,
    *,
    apply_fn: Callable[..., Any] | None = None,
    example_args: Sequence[object] = (),
    train: Targets = (),
    bias: str = "none",
    exclude: Targets = (),
    **settings: Any,
) -> tuple[Params, Params]:
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
        **settings: ``rank``, ``alpha``, ``scaling``, ``init``, ``dropout``, ``variant``, ``axes``, ``dtype``,
            ``base``.

    Returns:
        ``(frozen, lora)``.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> frozen, lora = init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, "kernel", rank=2, alpha=4)
    >>> lora["kernel"].a.shape, lora["kernel"].b.shape, lora["kernel"].scale
    ((4, 2), (2, 3), 2.0)
    """
    check_key(key)
    rules, full, excluded = compile_rules(targets, train, exclude, **settings)
    if apply_fn is None and len(example_args):
        raise ValueError("example_args= are the inputs of apply_fn=, and there is none. Pass both, or neither.")
    if not callable(apply_fn) and apply_fn is not None:
        raise TypeError(f"apply_fn={apply_fn!r}: expected a function apply_fn(params, *example_args).")
    if not isinstance(example_args, (tuple, list)):
        kind = type(example_args).__name__
        raise TypeError(f"example_args is of type {kind}; expected a tuple of arguments, such as example_args=(x,).")
    rule_of = assign_rules(_leaves(params), rules, full=full, exclude=excluded, bias=check_bias(bias))
    return _create(key, params, rule_of, apply_fn, tuple(example_args), {})


def compile_rules(
    targets: Any, train: Any, exclude: Any, **settings: Any
) -> tuple[tuple[Rule, ...], tuple[Rule, ...], tuple[Rule, ...]]:
    """The rules that ``targets=``, ``train=`` and ``exclude=`` of `wrap` spell."""
    defaults = Rule((), **settings).fill(DEFAULTS)
    full, none = Rule((), train="full"), Rule((), train="none")
    return tuple(as_rules(targets, defaults)), tuple(as_rules(train, full)), tuple(as_rules(exclude, none))


def _leaves(params: Params) -> dict[Path, Leaf]:
    """The leaves of ``params`` by path, checked."""
    leaves = flatten(params)
    for path, leaf in leaves.items():
        check_leaf(path, leaf, "params")
    return leaves


def _create(
    key: Key,
    params: Params,
    rule_of: Mapping[Path, Rule],
    apply_fn: Callable[..., PyTree] | None,
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> tuple[Params, Params]:
    paths = [path for path, rule in rule_of.items() if rule.train in ("lora", "tokens") and rule.axes is None]
    if apply_fn is None or not paths:
        return create(key, params, rule_of)
    axes_of, shape_of = infer_axes(bind_named_axes(apply_fn), params, paths, args, kwargs)
    return create(key, params, rule_of, axes_of, shape_of)
