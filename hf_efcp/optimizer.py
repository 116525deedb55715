"""EFCP: compressor, window and preconditioner meet in one `torch.optim.Optimizer`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch.optim.optimizer import ParamsT

from . import adamw, budget, checks, layout, shards
from .accounting import count_bytes
from .compressors import Compressor
from .error_feedback import push
from .errors import error_store
from .kernels import Kernels, check_name, choose, pool, widest
from .layout import Layout
from .metric import METRICS, Metric
from .preconditioners import Combination, Preconditioner, WindowPosition
from .shards import is_sharded, local
from .sites import Group, Member, Site, dense
from .threads import one_thread
from .update import Move, move_all
from .vectors import Vectors

if TYPE_CHECKING:
    from .whole import Whole

FORMAT = 3  # of the state; a checkpoint says which it has
_FLOAT32_MAX = torch.finfo(torch.float32).max
_FITS = 2.0**64  # coefficients below this, times rows of whitened entries, are within float32
_NOTHING = torch.empty(0, device="cpu")
_SQUARED = 4 << 20  # entries of gradients that are converted to float32 at a time


def _never_compiled(function: Callable[[Any], None]) -> Callable[[Any], None]:
    """Have `torch.compile` run a method as it is: it would trace the loops over tensors, and fail at numba's tables."""
    disabled: Callable[[Any], None] | None = None  # made late, for it imports the compiler, which takes seconds

    @wraps(function)
    def inner(self: Any) -> None:
        nonlocal disabled
        if disabled is None:
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        disabled(self)

    return inner


class Pushed(NamedTuple):
    """What a step knows of parameters that share a matrix, once their rows are in the window.

    `sites` have a gradient; `column` is that of the Gram matrix, and `products` are `G x` with `|x|^2` behind them,
    both of this process's part of the parameters, and on their device until `_collect`.
    """

    gram_state: dict[str, Any]
    sites: list[Site]
    now: WindowPosition
    column: torch.Tensor
    products: torch.Tensor


class EFCP(torch.optim.Optimizer):
    """Full-matrix preconditioning over a window of compressed gradients, with error feedback.

    One step, for all parameters together (EFCP, arXiv 2306.06098, algorithm 1):

        a_t   = e_t + g_t               accumulator: error + gradient
        row_t = C(a_t)                  compressor
        e_t+1 = a_t - row_t             error feedback
        G     <- row_t in the place of the oldest of the last m rows
        u_t   = P(G)^-1 row_t = G^T c   preconditioner, c from the Gram matrix G G^T
        v_t   = momentum v_t-1 + u_t    heavy ball on the update
        theta <- (1 - lr weight_decay) theta - lr v_t

    In AdamW's metric (`metric="adam"`, see `hf_efcp/metric.py`) rows are `D^-1/2 g`, `D = diag(sqrt(v_hat) + eps)` with
    AdamW's second moment `v`, and the update is

        u = D^-1/2 f(G^T G) y,   f(0) = 1,

    where `y` is `D^-1/2` times the gradient or AdamW's first moment, or the row, or a first moment over the window's
    rows (`precondition`, `beta1`). With so much dampening that `f = 1` this is RMSprop or AdamW; the matrix turns and
    shortens what they would do, and learning rates are AdamW's.

    Parameter groups may set `lr`, `weight_decay`, `decoupled_weight_decay`, `momentum` and `preconditioned`; all else
    is one value for the optimizer, because the preconditioner is one matrix over all groups. `preconditioned=False`
    steps a group as `torch.optim.AdamW` would (betas 0.9 and 0.999, eps 1e-8) at the group's own learning rate.

    `momentum` stands in `param_groups` as `heavy_ball`: `OneCycleLR` and `CyclicLR` cycle whatever is called momentum
    or betas there, up to 0.95, which for this update is a step 20 times as long. They need `cycle_momentum=False`.

    Arithmetic is float32, the Gram matrix and every sum over rows float64 (in a metric, low-rank and dense rows are
    summed in float32). A parameter without a gradient is neither
    decayed nor moved, its row is zero and its error kept; a step in which no parameter has a gradient does nothing.
    Parameters may be float32, bfloat16 or float16, contiguous or not, and all on one device. State is allocated at the
    first step; parameters that are added or unfrozen later have zeros in the rows that were pushed without them.

    Parameters that FSDP2 has sharded (`fully_shard`) are stepped where they are: every rank keeps the window and the
    error of its shards, and the new Gram column is summed over the ranks. Top-k then equals that of one process whose
    parameters are cut at the shards' borders; so do low-rank rows and a factored second moment.

    Args:
        params: Parameters or groups, as for any `torch.optim.Optimizer`.
        lr: Learning rate, at least 0.
        compressor: `C`, for example `TopK(density=0.01)`.
        preconditioner: `P`, for example `MFAC(damp=1e-5)`.
        num_grads: Capacity `m` of the window, in gradients; given unless there is a `memory_budget`.
        momentum: Heavy-ball factor of the update, in [0, 1); costs 4 bytes per parameter unless it is 0. An update
            that stays the same comes to be `1 / (1 - momentum)` times as long.
        weight_decay: Weight decay, at least 0.
        decoupled_weight_decay: True shrinks the parameters (AdamW's way); False adds `weight_decay * theta` to the
            gradient before the accumulator (L2 regularisation).
        precondition: What `P(G)^-1` is applied to: "row", the compressed row, in a metric with `beta1` a first moment
            over the window's rows; "gradient", the dense gradient; or, in a metric, "momentum", AdamW's first moment.
        scope: "model", one preconditioner over all parameters, or "layer", one for each parameter.
        metric: "none" for the paper's rule, "adam" for AdamW's metric, or "factored" for the same with a second moment
            of rows and columns (`hf_efcp/metric.py`).
        metric_dtype: How the second moment is kept: float32, bfloat16 or int8 (17 / 16 bytes).
        metric_beta2: Decay of the second moment, in [0, 1).
        metric_eps: What is added to the root of the second moment, positive.
        beta1: Decay of the first moment, in [0, 1), in a metric: of the dense one with `precondition="momentum"`; with
            "row", of one over the window's rows, `sum_i w_i row_i`, `w_i = (1 - beta1) beta1^age_i / (1 - beta1^n)` for
            the `n` rows there are. That one needs no buffer: the window has it.
        momentum_dtype: How the first moment is kept: float32 or bfloat16.
        error_dtype: How the error is kept.
        nonfinite: What to do about a gradient with NaN or infinity, on any rank: "raise" an error, or "skip" the step
            and count it in `skipped_steps`; nothing changes either way. "ignore" does not look, for those who do so
            themselves (a GradScaler does): the only time a step on a GPU waits for the device is for this.
        backend: "auto" (numba on the CPU, Triton on CUDA and ROCm, plain torch elsewhere), "reference" (plain torch),
            "numba" or "triton".
        memory_budget: Instead of `num_grads`: what all state may take, in bytes per parameter ("8B/param"), as text
            ("300MB", "2GiB": powers of 1000 and of 1024) or as an int of bytes. Takes the largest window that fits,
            for the parameters that are there and require a gradient, excluded ones included; counted whole, before
            FSDP2 shards them. `num_grads` in the parameter groups says which.

    Raises:
        ValueError: A value outside its range, or a budget that no window fits.
        TypeError: `num_grads` is not an int, an argument is text where it should be a number, or a parameter has a
            dtype that is not supported.

    Examples:
        >>> import torch
        >>> from hf_efcp import EFCP
        >>> from hf_efcp.compressors import TopK
        >>> from hf_efcp.preconditioners import MFAC
        >>> layer = torch.nn.Linear(20, 5)
        >>> parts = {"compressor": TopK(density=0.1), "preconditioner": MFAC(damp=1e-3)}
        >>> optimizer = EFCP(layer.parameters(), lr=0.01, num_grads=8, **parts)
        >>> layer(torch.ones(4, 20)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.memory()["values"]  # 8 rows of 10 and of 1 entries in bfloat16
        176
    """

    _whole: Whole | None = None  # made by the first step that wants it, and not part of a copy
    _warned: bool = False

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        compressor: Compressor,
        preconditioner: Preconditioner,
        num_grads: int | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        precondition: str = "row",
        scope: str = "model",
        metric: str = "none",
        metric_dtype: torch.dtype = torch.float32,
        metric_beta2: float = 0.999,
        metric_eps: float = 1e-8,
        beta1: float = 0.0,
        momentum_dtype: torch.dtype = torch.float32,
        error_dtype: torch.dtype = torch.float32,
        nonfinite: str = "raise",
        backend: str = "auto",
        memory_budget: int | str | None = None,
    ) -> None:
        given = dict(locals())
        if memory_budget is not None:
            if not isinstance(num_grads, budget.Default | None):
                raise ValueError(
                    f"num_grads={num_grads!r} and memory_budget={memory_budget!r} both choose the window: give one"
                )
            num_grads = 1  # until it is known what there is to fit
        if not isinstance(num_grads, int) or isinstance(num_grads, bool):
            raise TypeError(f"num_grads must be an int, got {num_grads!r}")
        if num_grads < 1:
            raise ValueError(f"num_grads is the number of gradients in the window, at least 1; got {num_grads}")
        num_grads = int(num_grads)
        checks.check_kinds(given, checks.kinds(EFCP.__init__))
        checks.check_choice("precondition", precondition, ("row", "gradient", "momentum"))
        checks.check_choice("metric", metric, METRICS)
        checks.check_choice("scope", scope, ("model", "layer"))
        checks.check_choice("nonfinite", nonfinite, ("raise", "skip", "ignore"))
        check_name(backend)
        checks.check_momentum(precondition, metric, beta1)
        preconditioner.check(precondition, metric)
        if scope == "layer" and not preconditioner.uses_gram:
            raise ValueError(f'{type(preconditioner).__name__} has no matrix, and so none per layer: use scope="model"')
        made = None
        if metric != "none":
            kept = beta1 if precondition == "momentum" else 0.0
            made = Metric(metric, metric_dtype, kept, metric_beta2, metric_eps, momentum_dtype)
        self._preconditioner = preconditioner
        self._layout = Layout(compressor, error_store(error_dtype), preconditioner, num_grads, made)
        self._precondition = precondition
        self._nonfinite = nonfinite
        self._backend = backend
        # What decides the shapes of the state, and so can neither change nor differ in a checkpoint.
        structure: Group = {
            "num_grads": num_grads,
            "scope": scope,
            "error_dtype": error_dtype,
            "metric": metric,
            "precondition": precondition,
        }
        if made is not None:
            structure |= {
                "metric_dtype": metric_dtype,
                "metric_beta2": metric_beta2,
                "metric_eps": metric_eps,
                "metric_beta1": beta1,  # GGT's hyperparameter stands there as beta1
                "momentum_dtype": momentum_dtype,
            }
        self._structure = _plain(structure | asdict(compressor))
        self._tunable = tuple(asdict(preconditioner))
        defaults = {
            "lr": lr,
            checks.HEAVY_BALL: momentum,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "preconditioned": True,
            "skipped_steps": 0,
            "efcp_format": FORMAT,
        }
        checks.check_names([defaults, structure, asdict(compressor), self._tunable])
        defaults |= {**self._structure, **asdict(preconditioner)}
        self._settings = tuple(defaults)
        self._own = tuple(self.__dict__)  # what the base class does not know
        super().__init__(params, defaults)
        if memory_budget is not None:
            self._fit(memory_budget)

    def __getstate__(self) -> dict[str, Any]:
        """The base class drops every attribute that it does not know from copies and pickles."""
        return {**super().__getstate__(), "_own": self._own, **{name: self.__dict__[name] for name in self._own}}

    @property
    def backend(self) -> str:
        """The backend that steps the parameters where they are now: "numba", "triton" or "reference"."""
        return choose(self._backend, checks.check_one_device(member.param for member in self._members())).NAME

    @property
    def skipped_steps(self) -> int:
        """Steps that `nonfinite="skip"` left out, since the start and over all resumes."""
        return int(self.param_groups[0]["skipped_steps"])

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, before or after the first step.

        Args:
            param_group: As for any `torch.optim.Optimizer`.

        Raises:
            ValueError: A value is outside its range, or differs from the optimizer's where it may not.
            TypeError: A parameter has a dtype that is not supported.
        """
        shared = self._shared()
        param_group = {**shared, **self._with_names(_renamed(_plain(param_group)))}
        checks.check_group({**self.defaults, **param_group}, shared)
        # Schedules change the learning rate: what was given is kept to be compared with what a checkpoint has.
        param_group.setdefault("given_lr", float(param_group.get("lr", self.defaults["lr"])))
        super().add_param_group(param_group)
        try:
            for param in self.param_groups[-1]["params"]:
                if param.requires_grad:
                    checks.check_parameter(param, self._name)
        except TypeError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. What is wrong with the gradients is raised before anything has changed.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            The closure's loss, or None without a closure.

        Raises:
            ValueError: A gradient has NaN or infinity, parameters are on several devices, or a group's settings are
                out of range or differ where they may not. Also if the update would overflow, for want of dampening:
                then no parameter has moved, but the window has the gradient.
            TypeError: A gradient is sparse, or a parameter's dtype is not supported.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_all()
        return loss

    def memory(self) -> dict[str, int]:
        """Bytes of the state that exists now; `hf_efcp.estimate_memory` tells them beforehand.

        Returns:
            Bytes by part: `indices` and `values` of the window, `error`, `momentum` (with first moments, and the
            moments and sums of diagonal rules), `metric`, `gram`, and their `total`.
        """
        return count_bytes(self.state[member.param] for member in self._members() if member.param in self.state)

    def planned_memory(self, num_grads: int | None = None) -> dict[str, int]:
        """Bytes of the state once every parameter that requires a gradient has been stepped.

        Args:
            num_grads: What they would be with so many gradients in the window; None for as many as there are.

        Returns:
            As `memory`.
        """
        plan = self._layout if num_grads is None else self._layout.resized(num_grads)
        trainable = [member for member in self._members() if member.param.requires_grad]
        states = [plan.fresh(member, "meta") for member in trainable]
        for member, state in zip(trainable, states, strict=True):
            if is_sharded(member.param) and member.group["preconditioned"]:
                own = {name: tensor[:1] for name, tensor in state.items() if name != "gradients"}
                state.update(own)  # this rank's row
        units = [member for member in trainable if member.group["preconditioned"]]
        gram_states = len(units) if self._structure["scope"] == "layer" else min(1, len(units))
        return count_bytes([*states, *(plan.gram_state("meta") for _ in range(gram_states))])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned, bit for bit.

        The base class would cast every tensor to its parameter's dtype, indices too. Hyperparameters come from the
        checkpoint, as in every `torch.optim.Optimizer`, with a warning if others were given; those that decide the
        shapes of the state must be equal.

        Args:
            state_dict: A checkpoint of the same optimizer over the same groups.

        Raises:
            ValueError: It does not fit. Nothing was changed.
        """
        saved_groups = state_dict["param_groups"]
        self._check_groups(saved_groups)
        keys = [key for group in saved_groups for key in group["params"]]
        owners = [group for group in saved_groups for _ in group["params"]]
        loaded = [
            (member._replace(group=saved_group), state_dict["state"][key])
            for key, saved_group, member in zip(keys, owners, self._members(), strict=True)
            if state_dict["state"].get(key)
        ]
        for member, saved in loaded:
            self._layout.check(saved, member, self._name(member.param))
        windows = [saved for member, saved in loaded if member.group["preconditioned"]]
        checks.check_gram_states(windows, self._layout.gram_state("meta"), self._structure["scope"] == "layer")
        self._warn_of_changes(saved_groups)
        super().load_state_dict({**state_dict, "state": {}})
        for member, saved in loaded:
            self.state[member.param] = {name: layout.copied(name, value, member.param) for name, value in saved.items()}

    def _check_groups(self, saved_groups: list[Group]) -> None:
        """Refuse the parameter groups of a checkpoint that does not fit."""
        checks.check_writer(saved_groups, self._settings, FORMAT, type(self).__name__)
        checks.check_settings(saved_groups, self.param_groups, ("preconditioned", *self._structure))

    def _warn_of_changes(self, saved_groups: list[Group]) -> None:
        """Warn of settings that the checkpoint replaces."""
        names = (checks.HEAVY_BALL, "weight_decay", "decoupled_weight_decay", *self._tunable)
        if changed := checks.changed_settings(saved_groups, self.param_groups, names):
            warnings.warn(
                "the settings of the checkpoint are taken, as in every torch.optim.Optimizer, and not those that were "
                f"given: {', '.join(changed)}. To use yours, set them in optimizer.param_groups after loading "
                "(momentum is called heavy_ball there)",
                stacklevel=3,
            )

    @_never_compiled
    def _step_all(self) -> None:
        """Step everything that has a gradient."""
        active = [m for m in self._members() if m.param.requires_grad or m.param.grad is not None]
        if all(member.param.grad is None for member in active):
            return
        with one_thread():
            stepped = self._step(active)
        if stepped:
            self._step_excluded()

    def _step(self, active: list[Member]) -> bool:
        """Check everything, then step what is preconditioned; whether the step was not skipped."""
        device = checks.check_one_device(member.param for member in active)
        shared = self._shared()
        for group in self.param_groups:
            checks.check_group(group, shared)
        for member in active:
            checks.check_parameter(member.param, self._name)
            checks.check_gradient(member.param, self._name)
            state = self.state.get(member.param)
            if state and ("exp_avg" in state) == member.group["preconditioned"]:
                raise ValueError(
                    f"preconditioned of a group was changed after the first step, and {self._name(member.param)} has "
                    "the other kind of state: set it before the first step"
                )
        processes = shards.check([member.param for member in active])
        kernels = choose(self._backend, device)
        whole = self._whole_steps(kernels, active, device)
        if whole is not None:
            whole.check(active, self.state, self._name)
        if self._nonfinite != "ignore":
            squares = _squares(active, kernels) if whole is None else whole.squares(active)
            if self._refuses_nonfinite(active, squares, processes, device):
                return False
        preconditioner = replace(self._preconditioner, **{name: shared[name] for name in self._tunable})
        preconditioner.check(self._precondition, self._structure["metric"])

        self._allocate(active)
        vectors = Vectors(self._layout.metric, self.state, kernels)
        units = [self._sites(unit) for unit in self._units()]
        if whole is not None:
            self._step_whole(whole, self._begin(units), preconditioner, vectors)
            return True
        pushed = self._push(self._begin(units), preconditioner, kernels, vectors)
        pushed = self._collect(pushed, processes, device)
        plans = self._plan(pushed, preconditioner, device)
        moves = []
        for (_, sites, *_), plan in zip(pushed, plans, strict=True):
            moves += [self._move(site, plan, preconditioner, kernels, vectors) for site in sites]
        move_all(moves, kernels)
        return True

    def _step_excluded(self) -> None:
        """Step the groups that are not preconditioned."""
        for group in self.param_groups:
            if not group["preconditioned"]:
                params = [param for param in group["params"] if param.grad is not None]
                states = [self.state[param] for param in params]
                adamw.step(params, states, lr=float(group["lr"]), weight_decay=group["weight_decay"])

    def _fit(self, memory_budget: int | str) -> None:
        """Take the largest window that fits."""
        params = [member.param for member in self._members() if member.param.requires_grad]
        if any(map(is_sharded, params)):
            raise ValueError(
                "memory_budget counts whole parameters, but these are sharded, and every rank must have the same "
                "num_grads: call hf_efcp.largest_window before fully_shard, and give the num_grads that it returns"
            )
        self._resize(budget.fit(memory_budget, sum(param.numel() for param in params), self.planned_memory))

    def _resize(self, num_grads: int) -> None:
        """Set the capacity of the window, before anything is allocated."""
        self._layout = self._layout.resized(num_grads)
        for settings in (self._structure, self.defaults, *self.param_groups):
            settings["num_grads"] = num_grads

    def _members(self) -> list[Member]:
        pairs = ((group, param) for group in self.param_groups for param in group["params"])
        return [Member(position, group, param) for position, (group, param) in enumerate(pairs)]

    def _units(self) -> list[list[Member]]:
        """Parameters that share a preconditioner. One without a gradient takes part, with a row of zeros."""
        members = [m for m in self._members() if m.group["preconditioned"] and self.state.get(m.param)]
        if self._structure["scope"] == "layer":
            return [[member] for member in members if member.param.grad is not None]
        return [members] if any(member.param.grad is not None for member in members) else []

    def _shared(self) -> Group:
        """The settings that are one value for all groups, as they are now."""
        source = self.param_groups[0] if self.param_groups else self.defaults
        return {**self._structure, **{name: source[name] for name in self._tunable}}

    def _with_names(self, group: Group) -> Group:
        """A group with names for its parameters if the other groups have names: torch wants all or none."""
        params = group["params"]
        if isinstance(params, torch.Tensor):
            params = [params]
        if isinstance(params, set) or not any("param_names" in other for other in self.param_groups):
            return group
        params, number = list(params), len(self.param_groups)
        if any(isinstance(param, tuple) for param in params):
            return {**group, "params": params}
        return {**group, "params": [(f"parameter {place} of group {number}", p) for place, p in enumerate(params)]}

    def _name(self, param: torch.Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for position, candidate in enumerate(group["params"]):
                if candidate is param:
                    if "param_names" in group:
                        return str(group["param_names"][position])
                    return f"parameter {position} of group {number} (shape {tuple(param.shape)})"
        raise KeyError("not a parameter of this optimizer")

    def _allocate(self, active: list[Member]) -> None:
        """Make the state of the parameters that have none."""
        for member in active:
            group, param, state = member.group, member.param, self.state[member.param]
            if not state:
                fresh = self._layout.fresh(member, param.device)
                if group["preconditioned"] and (
                    self._structure["scope"] == "layer" or not self._gram_state(self._members())
                ):
                    # With a parameter, since a checkpoint keeps nothing that no parameter owns.
                    fresh |= self._layout.gram_state(param.device)
                state.update(fresh)  # all of it or, if memory runs out, nothing
            elif group["preconditioned"] and group[checks.HEAVY_BALL] and "momentum" not in state:  # switched on since
                state.update(shards.allocate(param, layout.momentum, param.device))

    def _gram_state(self, members: Iterable[Member]) -> dict[str, Any]:
        """The state that holds what a unit has in common; empty before the first step."""
        return next((self.state[m.param] for m in members if "pushed" in self.state.get(m.param, ())), {})

    def _sites(self, unit: list[Member]) -> list[Site]:
        views = ((m, shards.view(self.state[m.param], m.param, self._layout.maker(m))) for m in unit)
        return [Site(state, local(m.param).shape, m) for m, state in views]

    def _refuses_nonfinite(
        self,
        active: list[Member],
        squares: dict[int, float],
        processes: torch.distributed.ProcessGroup | None,
        device: torch.device,
    ) -> bool:
        """Whether the step is to be skipped, on all ranks if on one; `squares` are `|g|^2`, by position."""
        bad = [
            member.param
            for member in active
            if member.param.grad is not None and not checks.is_finite(member.param.grad, squares[member.position])
        ]
        count = float(shards.all_reduce(torch.tensor([len(bad)], dtype=torch.float64, device="cpu"), processes, device))
        if count and self._nonfinite == "raise":
            raise ValueError(checks.nonfinite_message(bad, self._name))
        if count:
            for group in self.param_groups:
                group["skipped_steps"] += 1
        return count > 0.0

    def _whole_steps(self, kernels: Kernels, active: list[Member], device: torch.device) -> Whole | None:
        """What steps the whole model in a few launches; None where the backend, or the optimizer, has no such step."""
        if kernels.NAME != "triton":
            return None
        from .whole import Whole, refusal  # Triton is imported where it is used

        reason = refusal(self._layout, self._preconditioner, self._precondition, active)
        if reason is not None:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"the Triton kernels have no step for {reason}: this optimizer runs plain torch kernels, tensor by "
                    'tensor, which are many times slower on a GPU. backend="reference" silences this',
                    stacklevel=2,
                )
            return None
        if self._whole is None or self._whole.device != device:
            self._whole = Whole(self._layout, device)
        return self._whole

    def _step_whole(self, whole: Whole, pushed: list[Pushed], preconditioner: Preconditioner, vectors: Vectors) -> None:
        """The step of everything that is preconditioned, in a few launches."""
        if not pushed:
            return
        vectors.begin([site for unit in pushed for site in unit.sites])
        columns = whole.push([(unit.sites, unit.now) for unit in pushed])
        for unit in pushed:
            unit.gram_state["pushed"] = unit.now.steps
        states, beta1 = [unit.gram_state for unit in pushed], self._structure.get("metric_beta1", 0.0)
        coefficients = whole.solve(states, [unit.now for unit in pushed], columns, preconditioner, beta1)
        if coefficients is None:
            own = [
                unit._replace(column=column[: unit.now.rows], products=_no_products(unit.now, columns.device))
                for unit, column in zip(pushed, columns, strict=True)
            ]
            own = self._collect(own, None, columns.device)
            coefficients = torch.zeros_like(columns)
            for place, plan in enumerate(self._plan(own, preconditioner, columns.device)):
                coefficients[place, : own[place].now.rows] = plan.coefficients
        whole.move(coefficients)

    def _begin(self, units: list[list[Site]]) -> list[Pushed]:
        """Where the windows of units stand, with rows of zeros for what has no gradient, and sums of zeros."""
        window, pushed = self._layout.window, []
        for sites in units:
            gram_state, now = self._place(sites)
            present = [site for site in sites if site.member.param.grad is not None]
            for site in sites:
                if site.member.param.grad is None:
                    window.clear(site.state, site.shape, now.newest)
            pushed.append(Pushed(gram_state, present, now, _NOTHING, _NOTHING))
        return pushed

    def _push(
        self, pushed: list[Pushed], preconditioner: Preconditioner, kernels: Kernels, vectors: Vectors
    ) -> list[Pushed]:
        """Push the rows, and take the products that the matrices need."""
        window = self._layout.window
        for place, unit in enumerate(pushed):
            device = unit.sites[0].member.param.device
            column = torch.zeros(unit.now.rows, dtype=widest(device), device=device)
            pushed[place] = unit._replace(column=column, products=_no_products(unit.now, device))
        rows = [(site, unit.now) for unit in pushed for site in unit.sites]
        vectors.begin([site for site, _ in rows])
        push(rows, self._layout, kernels, vectors)
        for site, now in rows:
            preconditioner.observe(now, window, site.state, site.shape, kernels)
        for unit in pushed:
            unit.gram_state["pushed"] = unit.now.steps
        if preconditioner.uses_gram:
            self._add_columns(pushed, kernels)
        if self._precondition != "row":
            for unit in pushed:
                unit.products.add_(self._products(unit.sites, unit.now, kernels, vectors))
        return pushed

    def _place(self, sites: list[Site]) -> tuple[dict[str, Any], WindowPosition]:
        """What a unit has in common, and where its window stands in this step."""
        gram_state, capacity = self._gram_state(site.member for site in sites), self._structure["num_grads"]
        steps = gram_state["pushed"] + 1
        lr = max(float(site.member.group["lr"]) for site in sites)
        return gram_state, WindowPosition((steps - 1) % capacity, min(steps, capacity), capacity, steps, lr)

    def _add_columns(self, pushed: list[Pushed], kernels: Kernels) -> None:
        """The new columns of the Gram matrices; those of windows that stand at the same place are taken together."""
        for now in dict.fromkeys(unit.now for unit in pushed):
            units = [unit for unit in pushed if unit.now == now]
            held = [(site.state, site.shape) for unit in units for site in unit.sites]
            columns = self._layout.window.dots(held, now.newest, now.rows, kernels)
            for unit, some in zip(units, torch.split(columns, [len(unit.sites) for unit in units]), strict=True):
                unit.column.add_(some.sum(dim=0))

    def _products(self, sites: list[Site], now: WindowPosition, kernels: Kernels, vectors: Vectors) -> torch.Tensor:
        """`G x` of the dense vector, and without a metric `|x|^2` behind it, `(rows + 1,)`. Threads share the spans."""
        window, tasks = self._layout.window, []
        for site in sites:
            vector = vectors.preconditioned(site)
            tasks += [(site, span, vector) for span in window.spans(site.shape, site.member.param.device)]
        device = sites[0].member.param.device
        parts = torch.zeros(len(tasks), now.rows + 1, dtype=widest(device), device=device)

        def work(index: int, begin: int, end: int) -> None:
            site, span, vector = tasks[index]
            x = vector(span)
            parts[index, :-1] = window.project(site.state, site.shape, span, x, now.rows, kernels)
            if self._layout.metric is None:  # else no length is needed
                parts[index, -1] = torch.linalg.vector_norm(x, dtype=parts.dtype).square()

        if tasks:
            pool.run_torch(work, len(tasks), 1, device)
        return parts.sum(dim=0)

    def _collect(
        self, pushed: list[Pushed], processes: torch.distributed.ProcessGroup | None, device: torch.device
    ) -> list[Pushed]:
        """Columns and products of all processes on the CPU, in one message; the columns go into the Gram matrices."""
        if not pushed:
            return pushed
        own = [tensor for unit in pushed for tensor in (unit.column, unit.products)]
        total = shards.all_reduce(torch.cat(own), processes, device)
        summed = torch.split(total, [len(tensor) for tensor in own])
        found = []
        for unit, column, products in zip(pushed, summed[::2], summed[1::2], strict=True):
            if "gram" in unit.gram_state:
                unit.gram_state["gram"] = unit.gram_state["gram"].to("cpu")  # `Whole` has it elsewhere
                unit.gram_state["gram"][unit.now.newest, : unit.now.rows] = column
                unit.gram_state["gram"][: unit.now.rows, unit.now.newest] = column
            found.append(unit._replace(column=column, products=products))
        return found

    def _plan(self, pushed: list[Pushed], preconditioner: Preconditioner, device: torch.device) -> list[Any]:
        """The update of each unit, from its Gram matrix and products alone, with its coefficients on the device."""
        if self._layout.metric is not None:
            return self._shorten(pushed, preconditioner, device)
        plans = []
        for gram_state, sites, now, _, products in pushed:
            if not preconditioner.uses_gram:
                plans.append(_placed(preconditioner.plan(None, now), device))
                continue
            gram = gram_state["gram"][: now.rows, : now.rows]
            if self._precondition == "row":
                plan = preconditioner.plan(gram, now)
            else:
                plan = preconditioner.plan_outside(gram, products[:-1], now)
            self._check_length(sites, plan.length(gram, products))
            plans.append(_placed(plan, device))
        return plans

    def _shorten(self, pushed: list[Pushed], preconditioner: Preconditioner, device: torch.device) -> list[Combination]:
        """The same in the metric; units whose windows stand at the same place are solved as one batch."""
        row = self._precondition == "row"
        found: dict[int, torch.Tensor] = {}
        for now in dict.fromkeys(unit.now for unit in pushed):
            places = [place for place, unit in enumerate(pushed) if unit.now == now]
            grams = torch.stack([pushed[place].gram_state["gram"][: now.rows, : now.rows] for place in places])
            if row:
                weights = now.weights(self._structure["metric_beta1"])
                c = preconditioner.shorten(grams, grams @ weights, now) + weights
            else:
                products = torch.stack([pushed[place].products[:-1] for place in places])
                c = preconditioner.shorten(grams, products, now)
            # float32 is enough, but coefficients of rows that are tiny beside `x` may be beyond it; products are not.
            narrow = (c.abs().amax(dim=1) < _FITS).tolist()
            placed = c.to(device, widest(device))
            found |= {
                place: own.to(torch.float32) if fits else own
                for place, own, fits in zip(places, placed, narrow, strict=True)
            }
        return [Combination(found[place], 0.0 if row else 1.0) for place in range(len(pushed))]

    def _move(self, site: Site, plan: Any, preconditioner: Preconditioner, kernels: Kernels, vectors: Vectors) -> Move:
        """What makes the update of a parameter, span by span."""
        window, state, shape = self._layout.window, site.state, site.shape
        vector = None if self._precondition == "row" else vectors.preconditioned(site)

        def update(span: slice) -> torch.Tensor:
            base = None if vector is None else vector(span)
            u = preconditioner.update(plan, window, state, shape, span, kernels, base)
            return vectors.out_of_metric(site, span, u)

        return Move(site, window.spans(shape, site.member.param.device), update)

    def _check_length(self, sites: list[Site], length: float) -> None:
        """Refuse an update that may not fit the parameters: without dampening it is as long as a row is short."""
        for group, param in ((site.member.group, site.member.param) for site in sites):
            velocity = length / (1.0 - group[checks.HEAVY_BALL])
            largest = torch.finfo(param.dtype).max
            if not (velocity <= _FLOAT32_MAX and float(group["lr"]) * velocity <= largest):
                raise ValueError(
                    f"the update has length {length:.3g}, which with lr {float(group['lr']):g} may be beyond "
                    f"{param.dtype} ({largest:.3g}) in {self._name(param)}; no parameter was moved, and the gradient "
                    "is in the window. Use a lower learning rate or momentum, or a larger damp or eps"
                )


def _squares(active: list[Member], kernels: Kernels) -> dict[int, float]:
    """`|g|^2` by position."""
    positions, sums, count = [], [], 0
    waiting: list[torch.Tensor] = []  # converted, and so not all at a time
    for member in active:
        if member.param.grad is not None:
            positions.append(member.position)
            waiting.append(dense(member.param.grad).view(-1))
            count += member.param.grad.numel()
        if count > _SQUARED:
            sums.append(kernels.squares(waiting))
            waiting, count = [], 0
    if waiting:
        sums.append(kernels.squares(waiting))
    return dict(zip(positions, torch.cat(sums).tolist(), strict=True)) if sums else {}


def _no_products(now: WindowPosition, device: torch.device) -> torch.Tensor:
    """Products of no dense vector."""
    return torch.zeros(now.rows + 1, dtype=widest(device), device=device)


def _placed(plan: Any, device: torch.device) -> Any:
    """A plan with its tensors on a device."""
    if isinstance(plan, torch.Tensor):
        return plan.to(device, widest(device))
    if isinstance(plan, tuple):
        return tuple(_placed(part, device) for part in plan)
    return replace(plan, coefficients=_placed(plan.coefficients, device))


def _renamed(group: Group) -> Group:
    """A group as it was given, with its momentum under the name that it has in `param_groups`."""
    if "momentum" not in group:
        return group
    if checks.HEAVY_BALL in group:
        raise ValueError(f"a group has both momentum={group['momentum']} and {checks.HEAVY_BALL}: give momentum alone")
    return {checks.HEAVY_BALL if name == "momentum" else name: value for name, value in group.items()}


def _plain(settings: Mapping[str, Any]) -> Group:
    """Settings as they stand in the parameter groups: torch.distributed.checkpoint takes no dtypes there."""
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in settings.items()
    }
