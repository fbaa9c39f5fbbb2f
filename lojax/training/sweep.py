"""Many runs at once: one base, an adapter for each run, one compiled step for all of them.

A run is a mapping of settings; runs differ in any of them:

    runs = [
        {"learning_rate": rate, "rank": rank, "alpha": 2 * rank, "seed": seed}
        for rate in (1e-3, 3e-3) for rank in (4, 8) for seed in (0, 1)
    ]
    model = lojax.wrap(net, "**/kernel")

    def start(run):  # one run: (frozen, lora), as Model.init returns it
        return lojax.init(jax.random.key(run["seed"]), params, "**/kernel", rank=run["rank"], alpha=run["alpha"])

    def loss(frozen, lora, batch):  # one run
        return jnp.mean((model.apply(frozen, lora, batch.x) - batch.y) ** 2)

    def optimizer(run):  # one run: an optax transformation
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(run["learning_rate"]))

    sweep = lojax.sweep(runs, loss, optimizer)
    frozen, state = sweep.init(start)
    for batch in batches:
        state, losses = sweep.step(frozen, state, batch)  # losses [N], one for each run
    scores = sweep.map(accuracy)(frozen, state, test)  # any function of (frozen, lora, ...), for all runs
    print(sweep.table(accuracy=scores))
    best = sweep.best(scores, maximize=True)
    lojax.save("best", state.bank[best], frozen=frozen)

The user writes each function for one run. The sweep maps it over the runs with `jax.vmap`, so each adapter trains as it
would alone: its own gradient, its own optimizer state, its own global norm. The base is there once. Every product with
a frozen weight is one product of the rows of all runs, and what a net computes of shared data before its first adapted
weight is computed once for all runs. Products that ``execution="auto"`` chooses are factored: a fused one would form a
weight for each run. A start that moves the base (PiSSA, LoRA-GA, LoftQ) gives runs of different bases, which cannot
share one, unless it is the same in all runs.

What is data and what is compiled: numbers that differ between the runs reach ``optimizer`` as traced scalars, so one
program serves all of them, and `SweepState.values` holds them, where population-based training may change them.
Settings that are the same in all runs reach it as they are. Optax compares some numbers with others where it builds a
schedule, which a traced one does not allow; scale a schedule of peak 1 then:
``optax.adamw(lambda count: run["learning_rate"] * schedule(count))``. Ranks are padded with zeros to the largest, and
scales are static. All runs cost as much as the largest rank; the padding stays zero whatever the optimizer does, but an
optimizer that averages over a whole array (Adafactor) sees it.

A run stops where ``state.active`` is False: its adapter and its optimizer state then stay as they are, bit by bit. Its
operations are still done. A run that diverges leaves the others alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from lojax.adapters.adapter import Adapter, is_adapter
from lojax.adapters.axes import positions
from lojax.adapters.bank import Bank
from lojax.adapters.conform import with_arrays
from lojax.adapters.paths import flatten, map_paths
from lojax.adapters.stack import stack
from lojax.adapters.trees import check_pair
from lojax.report.runs import best_run, plot_runs, runs_table
from lojax.text import check_flags, spec
from lojax.training.optimizer import check_transformation
from lojax.training.run_settings import Run, Settings, as_numbers, differing
from lojax.types import Array, Leaf, Params, PyTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Optimizer = optax.GradientTransformation | Callable[[Run], optax.GradientTransformation]
InAxes = PyTree
"""As in `jax.vmap`, for the arguments after ``lora``: None for all that every run shares, 0 for one entry each."""


class SweepState(NamedTuple):
    """Everything of all runs that changes from step to step; a pytree.

    Attributes:
        bank: The adapters: ``bank[i]`` is the ``lora`` tree of run ``i``.
        optimizer: The states of the optimizers, every array with an axis of the runs in front.
        active: ``bool [N]``: whether each run still trains.
        values: The numbers in which the runs differ, ``[N]`` each, by name; the optimizer reads them.
    """

    bank: Bank
    optimizer: PyTree
    active: Array
    values: dict[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """Runs that train at once; `lojax.sweep` makes it. It holds no arrays: its methods are pure functions.

    Attributes:
        runs: The settings of each run.
        loss: ``loss(frozen, lora, *args)`` of one run.
        optimizer: ``optimizer(run)``, the optax transformation of one run; or one for all.
        in_axes: Which arguments of ``loss`` after ``lora`` hold one entry for each run.
        has_aux: Whether ``loss`` returns ``(loss, aux)``.
    """

    runs: tuple[Run, ...]
    loss: Callable[..., PyTree]
    optimizer: Optimizer
    in_axes: InAxes = None
    has_aux: bool = False

    def __len__(self) -> int:
        return len(self.runs)

    def init(self, start: Callable[[Run], tuple[Params, Params]]) -> tuple[Params, SweepState]:
        """The base, once, and the state before the first step.

        Args:
            start: ``start(run) -> (frozen, lora)``, called for each run with its own settings: `Model.init` or
                `lojax.init` of the same parameters. Variants must be the same; ranks, scales and targets may differ.

        Returns:
            ``(frozen, state)``.

        Raises:
            TypeError: ``start`` does not return a pair, or ``optimizer`` no optax transformation.
            ValueError: The runs have different bases, variants or rates of dropout.
        """
        frozen, loras = None, []
        for i, run in enumerate(self.runs):
            pair = start(run)
            if not (isinstance(pair, tuple) and len(pair) == 2):
                raise TypeError(
                    f"start returned a {type(pair).__name__} for runs[{i}]; expected the pair (frozen, lora) that "
                    "lojax.init returns."
                )
            check_pair(*pair)
            if i == 0:
                frozen = pair[0]
            _check_same_base(frozen, pair[0], i)
            loras.append(pair[1])
        bank = stack(loras)
        _check_dropout(bank)
        values = self._values()

        @jax.jit
        @jax.vmap
        def init(lora: Params, values: Mapping[str, Array]) -> PyTree:
            return self._transformation(values).init(lora)

        return frozen, SweepState(bank, init(bank.lora, values), jnp.ones(len(self), bool), values)

    @functools.cached_property
    def step(self) -> Callable[..., tuple[SweepState, PyTree]]:
        """``step(frozen, state, *args) -> (state, losses)``, one update of every active run; jitted.

        ``losses`` is ``[N]``, before the update; ``(losses, aux)`` with ``has_aux``. Stopped runs have a loss as well.
        """
        return jax.jit(self._step)

    def map(self, f: Callable[..., PyTree], *, in_axes: InAxes = None) -> Callable[..., PyTree]:
        """``f(frozen, lora, *args)`` of one run as ``g(frozen, state, *args)`` of all: evaluation, for one. Jitted.

        Args:
            f: What to compute for each run, such as its accuracy.
            in_axes: As in `lojax.sweep`, for the arguments of ``f``.

        Returns:
            ``g``, whose outputs have an axis of the runs in front. Keep it: another call of ``map`` compiles again.
        """
        return jax.jit(lambda frozen, state, *args: _map_runs(f, frozen, state.bank, args, in_axes))

    def table(self, *, over: str | None = "seed", **scores: ArrayLike) -> str:
        """Scores by setting, as text.

        Args:
            over: The setting that each line takes the mean and the standard deviation over; None for a line a run.
            **scores: One number for each run, ``[N]``, by the name of its column.

        >>> from lojax import sweep
        >>> runs = [{"rank": rank, "seed": seed} for rank in (1, 2) for seed in (0, 1)]
        >>> print(sweep(runs, lambda *_: 0.0, optax.sgd(0.1)).table(loss=[0.5, 0.75, 0.25, 0.25]))
        rank  runs  loss
        --------------------------
           1     2  0.625 ± 0.1768
           2     2  0.25 ± 0
        """
        return runs_table(self.runs, scores, over=over)

    def best(self, scores: ArrayLike, *, maximize: bool, over: str | None = "seed") -> int:
        """The number of the best run of the best setting: that with the best mean. Scores of NaN never win.

        Args:
            scores: One number for each run, ``[N]``.
            maximize: Whether a larger score is better (an accuracy) or a smaller one (a loss).
            over: The setting that the means are over; None takes the best run.

        Returns:
            A number ``i``, for ``sweep.runs[i]`` and ``state.bank[i]``.

        Raises:
            ValueError: No setting has a finite mean.
        """
        check_flags(maximize=maximize)
        return best_run(self.runs, scores, maximize=maximize, over=over)

    def plot(
        self, scores: ArrayLike, *, x: str = "learning_rate", label: str = "score", over: str | None = "seed"
    ) -> Figure:
        """Scores against one setting, with a line for each choice of the others; needs matplotlib.

        Args:
            scores: One number for each run, ``[N]``.
            x: The setting along the horizontal axis.
            label: What the scores are.
            over: The setting that the means and their standard deviations (as bars) are over.

        Returns:
            A figure: ``sweep.plot(scores).savefig("sweep.png")``.
        """
        return plot_runs(self.runs, scores, x=x, label=label, over=over)

    def _step(self, frozen: Params, state: SweepState, *args: PyTree) -> tuple[SweepState, PyTree]:
        def total(lora: Params) -> tuple[Array, PyTree]:
            bank = dataclasses.replace(state.bank, lora=lora)
            output = _map_runs(self.loss, frozen, bank, args, self.in_axes)
            losses = _check_losses(output, len(self), self.has_aux)
            # No run depends on the adapter of another: the gradient of the sum is that of each.
            return jnp.sum(losses), output

        def update(grads: Params, own: PyTree, lora: Params, values: dict[str, Array], loss: Array) -> PyTree:
            tx = optax.with_extra_args_support(self._transformation(values))
            updates, own = tx.update(grads, own, lora, value=loss)
            return optax.apply_updates(lora, updates), own

        grads, output = jax.grad(total, has_aux=True)(state.bank.lora)
        losses = output[0] if self.has_aux else output
        old = state.bank.lora, state.optimizer
        lora, optimizer = jax.vmap(update)(grads, state.optimizer, state.bank.lora, state.values, losses)
        lora = map_paths(lambda _, new, old: _keep_padding(new, old) if is_adapter(new) else new, lora, old[0])
        lora, optimizer = jax.tree.map(functools.partial(_select, state.active), (lora, optimizer), old)
        return state._replace(bank=dataclasses.replace(state.bank, lora=lora), optimizer=optimizer), output

    def _transformation(self, values: Mapping[str, Array]) -> optax.GradientTransformation:
        """The optimizer of one run, whose own numbers may be traced."""
        if not callable(self.optimizer):
            return self.optimizer
        shared = {name: x for name, x in self.runs[0].items() if name not in differing(self.runs)}
        tx = self.optimizer(Settings({**shared, **values}, differing(self.runs) - {*values}))
        check_transformation("optimizer(run)", tx)
        return tx

    def _values(self) -> dict[str, Array]:
        """The numbers in which runs differ, ``[N]`` each."""
        names = [name for name in self.runs[0] if name in differing(self.runs)]
        columns = {name: as_numbers([run[name] for run in self.runs]) for name in names}
        return {name: column for name, column in columns.items() if column is not None}


def sweep(
    runs: Sequence[Run],
    loss: Callable[..., PyTree],
    optimizer: Optimizer,
    *,
    in_axes: InAxes = None,
    has_aux: bool = False,
) -> Sweep:
    """Trains an adapter for each of ``runs`` on one base, in one compiled step: each as it would train alone.

    Args:
        runs: The settings of each run, with the same names in all.
        loss: ``loss(frozen, lora, *args)`` of one run, a scalar.
        optimizer: ``optimizer(run)``, the optax transformation of one run (`lojax.optimizer` too), where the numbers in
            which runs differ are traced scalars; or one transformation for all runs.
        in_axes: As in `jax.vmap`, for the arguments of ``loss`` after ``lora``. None: all runs share them. 0: each has
            an axis of the runs in front. Or a sequence with one of these for each argument, such as ``(None, 0)`` for a
            shared batch and ``jax.random.split(key, len(runs))``.
        has_aux: Whether ``loss`` returns ``(loss, aux)``, as in `jax.value_and_grad`; ``aux`` may hold metrics.

    Returns:
        A `Sweep` with ``init``, ``step``, ``map``, ``table``, ``best`` and ``plot``.

    Raises:
        TypeError: ``runs`` is no sequence of mappings, or ``loss`` or ``optimizer`` of the wrong kind.
        ValueError: ``runs`` is empty, their names differ, or they have different learning rates and one optimizer.

    >>> import lojax
    >>> params, x = {"w": jnp.eye(2)}, jnp.array([[1.0, 2.0]])
    >>> model = lojax.wrap(lambda p, x: x @ p["w"], "w")
    >>> runs = [{"learning_rate": rate, "rank": rank} for rate in (0.0, 0.1) for rank in (1, 2)]
    >>> start = lambda run: lojax.init(jax.random.key(0), params, "w", rank=run["rank"])
    >>> loss = lambda frozen, lora, x: jnp.sum(model.apply(frozen, lora, x) ** 2)
    >>> runs_at_once = sweep(runs, loss, lambda run: optax.sgd(run["learning_rate"]))
    >>> frozen, state = runs_at_once.init(start)
    >>> state, before = runs_at_once.step(frozen, state, x)
    >>> state, after = runs_at_once.step(frozen, state, x)
    >>> before.tolist(), (after < before).tolist()
    ([5.0, 5.0, 5.0, 5.0], [False, False, True, True])
    """
    if isinstance(runs, (str, Mapping)) or not isinstance(runs, Sequence):
        raise TypeError(f'runs is a {type(runs).__name__}; expected a list of settings: [{{"learning_rate": 1e-3}}].')
    if not runs:
        raise ValueError("runs is empty; a sweep takes the settings of at least one run.")
    for i, run in enumerate(runs):
        if not (isinstance(run, Mapping) and all(isinstance(name, str) for name in run)):
            raise TypeError(f'runs[{i}]={run!r:.80}; expected settings by name: {{"learning_rate": 1e-3}}.')
        if run.keys() != runs[0].keys():
            only = sorted(run.keys() ^ runs[0].keys())
            raise ValueError(f"runs[{i}] and runs[0] differ in having {only}. Give every run the same settings.")
    if not callable(loss):
        raise TypeError(f"loss={loss!r:.80}; expected a function loss(frozen, lora, *args).")
    check_flags(has_aux=has_aux)
    runs = tuple(dict(run) for run in runs)
    if not callable(optimizer):
        check_transformation("optimizer", optimizer)
        if "learning_rate" in differing(runs):
            raise ValueError(
                "The runs have different learning rates, and optimizer is one transformation for all. Pass a function: "
                'optimizer=lambda run: optax.adamw(run["learning_rate"]).'
            )
    return Sweep(runs, loss, optimizer, in_axes, has_aux)


def _map_runs(f: Callable[..., PyTree], frozen: Params, bank: Bank, args: tuple[Any, ...], in_axes: InAxes) -> PyTree:
    """``f(frozen, lora, *args)`` of every run."""
    axes = tuple(in_axes) if isinstance(in_axes, (tuple, list)) else (in_axes,) * len(args)
    if len(axes) != len(args):
        raise ValueError(f"in_axes={in_axes} is for {len(axes)} arguments after lora, and there are {len(args)}.")
    return jax.vmap(functools.partial(f, frozen), in_axes=(0, *axes), axis_size=len(bank))(bank.for_vmap(), *args)


def _check_losses(output: PyTree, size: int, has_aux: bool) -> Array:
    if has_aux and not (isinstance(output, tuple) and len(output) == 2):
        raise TypeError("has_aux=True, and loss does not return a pair (loss, aux).")
    losses = output[0] if has_aux else output
    if isinstance(losses, tuple):
        raise TypeError("loss returns a tuple. With metrics beside the loss, pass has_aux=True.")
    if getattr(losses, "shape", None) != (size,):
        got = spec(jax.ShapeDtypeStruct(losses.shape[1:], losses.dtype)) if hasattr(losses, "shape") else type(losses)
        raise ValueError(f"loss returns {got} for one run; expected a scalar. Take a mean or a sum.")
    return losses


def _keep_padding(new: Adapter, old: Adapter) -> Adapter:
    """``new`` where each adapter has its own rank, and ``old``, which is zero, in the padding around it."""
    assert old.entries is not None
    ranks = np.array([0 if entry is None else entry.rank for entry in old.entries])
    arrays = dict(new.arrays)
    stacked = len(positions(old.axes, "stack"))
    if old.a is not None and (ranks < old.rank).any():
        inside = np.arange(old.rank) < ranks[:, None]  # [N, r]
        a, b = arrays["a"], arrays["b"]
        at_a = inside.reshape(len(ranks), *[1] * (a.ndim - 2), old.rank)
        at_b = inside.reshape(len(ranks), *[1] * stacked, old.rank, *[1] * (b.ndim - 2 - stacked))
        arrays["a"] = jnp.where(at_a, a, old.arrays["a"])
        arrays["b"] = jnp.where(at_b, b, old.arrays["b"])
    if None in old.entries:
        present = jnp.array([entry is not None for entry in old.entries])
        arrays = {name: _select(present, x, old.arrays[name]) for name, x in arrays.items()}
    return with_arrays(new, arrays)


def _select(which: Array, new: Array, old: Array) -> Array:
    """``new`` in the entries ``which`` ``[N]`` of the first axis, and ``old`` in the others."""
    return jnp.where(which.reshape(-1, *[1] * (old.ndim - 1)), new, old)


def _check_same_base(frozen: Params, own: Params, i: int) -> None:
    """Raises unless both trees hold the same numbers."""
    ours, theirs = flatten(frozen), flatten(own)
    if ours.keys() != theirs.keys():
        raise ValueError(f"start gave runs[{i}] another tree of frozen weights than runs[0]. All runs share one base.")
    for path, leaf in ours.items():
        if leaf is not theirs[path] and not _equal_leaves(leaf, theirs[path]):
            raise ValueError(
                f"{path}: start gave runs[{i}] other frozen values than runs[0], and all runs share one base. Start "
                "from the same params. An init that takes its start out of the weight (PiSSA, LoftQ) cannot differ "
                "between runs, and base= quantizes the same weights in all."
            )


def _equal_leaves(x: Leaf, y: Leaf) -> bool:
    if jax.tree.structure(x) != jax.tree.structure(y):
        return False
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return all(a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(jnp.all(a == b))) for a, b in pairs)


def _check_dropout(bank: Bank) -> None:
    for path, leaf in flatten(bank.lora).items():
        rates = {entry.dropout for entry in (leaf.entries or ()) if entry} if is_adapter(leaf) else set()
        if len(rates) > 1:
            raise ValueError(
                f"{path}: the runs have different rates of dropout, {sorted(rates)}, which are part of the program. "
                "Make a sweep for each rate."
            )
