"""EFCP: compressor, window and preconditioner meet in one `torch.optim.Optimizer`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import ParamsT

from . import adamw, budget, checks, finite, graphs, groups, layout, loading, shards
from .accounting import count_bytes
from .base import FORMAT, GroupedOptimizer
from .compressors import Compressor
from .eager import never_compiled
from .errors import error_store
from .kernels import Kernels, check_name, choose
from .layout import Layout, State
from .leaves import Group, Leaf, ParamRef
from .metric import METRICS, Metric
from .preconditioners import Preconditioner
from .shards import is_sharded, local
from .step import Step
from .threads import one_thread
from .vectors import Vectors

if TYPE_CHECKING:
    from .whole import Whole


class EFCP(GroupedOptimizer):
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
    steps a group as `torch.optim.AdamW` would (betas 0.9 and 0.999, eps 1e-8) at the group's own learning rate, with
    both moments in float32. Entries of its gradients beyond 1.8e19, which have no square, count as that.

    `momentum` stands in `param_groups` as `heavy_ball`: `OneCycleLR` and `CyclicLR` cycle whatever is called momentum
    or betas there, up to 0.95, which for this update is a step 20 times as long. They need `cycle_momentum=False`.

    Arithmetic is float32, the Gram matrix and every sum over rows float64 (in a metric, low-rank and dense rows are
    summed in float32). A parameter without a gradient is neither decayed nor moved, its row is zero and its error kept;
    a step in which no parameter has a gradient does nothing. Parameters may be float32, bfloat16 or float16, contiguous
    or not, and all on one device. State is allocated at the first step; parameters that are added or unfrozen later
    have zeros in the rows that were pushed without them.

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
        metric_dtype: How the second moment is kept: float32, bfloat16 or int8 (17 / 16 bytes). int8 loses entries far
            below the largest of 64 neighbours: see docs/memory.md.
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
        capturable: True lets a CUDA graph take a step, as in `torch.optim`: the device counts steps. It wants
            a metric, M-FAC without `damp`, at most 64 gradients, `nonfinite="ignore"`, no group that is not
            preconditioned, and a step before the capture; a schedule works on an `lr` that is a tensor on the device.
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
        capturable: bool = False,
        backend: str = "auto",
        memory_budget: int | str | None = None,
    ) -> None:
        given = dict(locals())
        num_grads = budget.capacity(num_grads, memory_budget)
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
        self._capturable = capturable
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
        self._structure = groups.plain(structure | asdict(compressor))
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
        if capturable:
            graphs.check(self._layout, preconditioner, nonfinite)

    @property
    def backend(self) -> str:
        """The backend that steps the parameters where they are now: "numba", "triton" or "reference"."""
        return choose(self._backend, checks.check_one_device(ref.param for ref in self._refs())).NAME

    def memory(self) -> dict[str, int]:
        """Bytes of the state that exists now; `hf_efcp.estimate_memory` tells them beforehand.

        Returns:
            Bytes by part: `indices` and `values` of the window, `error`, `momentum` (with first moments, and the
            moments and sums of diagonal rules), `metric`, `gram`, and their `total`.
        """
        return count_bytes(self.state[ref.param] for ref in self._refs() if ref.param in self.state)

    def state_dict(self) -> dict[str, Any]:
        """State and parameter groups, as of any `torch.optim.Optimizer`."""
        self._read_counters()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        """Copies count for themselves."""
        self._read_counters()
        return super().__getstate__()

    def planned_memory(self, num_grads: int | None = None) -> dict[str, int]:
        """Bytes of the state once every parameter that requires a gradient has been stepped.

        Args:
            num_grads: What they would be with so many gradients in the window; None for as many as there are.

        Returns:
            As `memory`.
        """
        plan = self._layout if num_grads is None else self._layout.resized(num_grads)
        trainable = [ref for ref in self._refs() if ref.param.requires_grad]
        return count_bytes(plan.fresh_states(trainable, self._structure["scope"] == "layer"))

    def _check_group(self, group: Group, shared: Group) -> None:
        checks.check_group(graphs.check_group(group) if self._capturable else group, shared)

    def _forget(self) -> None:
        self._whole = None  # a CUDA graph has to be captured anew

    def _read_counters(self) -> None:
        """Let the states have what the device has counted."""
        if self._whole is not None:
            self._whole.read_counters()

    def _check_states(self, saved: list[tuple[ParamRef, State]]) -> None:
        loading.check(saved, self._layout, self._structure["scope"] == "layer", self._name)

    @never_compiled
    def _step_all(self) -> None:
        """Step everything that has a gradient."""
        active = [m for m in self._refs() if m.param.requires_grad or m.param.grad is not None]
        if all(ref.param.grad is None for ref in active):
            return
        with one_thread():
            squares = self._step(active)
        if squares is not None:
            adamw.step_excluded(active, self.state, squares)

    def _step(self, active: list[ParamRef]) -> Mapping[int, float] | None:
        """Check everything, then step what is preconditioned; `|g|^2` by position if known, None for a skipped step."""
        device = checks.check_one_device(ref.param for ref in active)
        shared = self._shared()
        for group in self.param_groups:
            self._check_group(group, shared)
        for ref in active:
            checks.check_parameter(ref.param, self._name)
            checks.check_gradient(ref.param, self._name)
            state = self.state.get(ref.param)
            if state and ("exp_avg" in state) == ref.group["preconditioned"]:
                raise ValueError(
                    f"preconditioned of a group was changed after the first step, and {self._name(ref.param)} has "
                    "the other kind of state: set it before the first step"
                )
        processes = shards.check([ref.param for ref in active])
        kernels = choose(self._backend, device)
        whole = self._whole_steps(kernels, active, device)
        if whole is not None:
            whole.check(active, self.state, self._name)
        squares: Mapping[int, float] = {}
        if self._nonfinite != "ignore":
            squares = finite.squares(active, kernels) if whole is None else whole.squares(active)
            if finite.skips(active, squares, processes, device, self._name, skip=self._nonfinite == "skip"):
                self._count_skipped()
                return None
        preconditioner = replace(self._preconditioner, **{name: shared[name] for name in self._tunable})
        preconditioner.check(self._precondition, self._structure["metric"])

        placed = whole is not None and whole.is_placed
        if not placed:
            self._allocate(active)
        units = [] if placed else [(self._leaves(refs), self._gram_state(refs)) for refs in self._units()]
        vectors = Vectors(self._layout.metric, self.state, kernels)
        beta1 = self._structure.get("metric_beta1", 0.0)
        step = Step(
            self._layout, preconditioner, self._precondition, beta1, kernels, vectors, processes, device, self._name
        )
        if whole is None:
            step.run([step.unit(leaves, gram_state) for leaves, gram_state in units])
        else:
            if not placed:
                whole.place(active, self.state, units)
            step.run_whole(whole)
        return squares

    def _whole_steps(self, kernels: Kernels, active: list[ParamRef], device: torch.device) -> Whole | None:
        """What steps the whole model in a few launches; None where the backend, or the optimizer, has no such step."""
        reason: str | None = f'backend="{kernels.NAME}"'
        if kernels.NAME == "triton":
            from .described import refusal  # Triton is imported where it is used
            from .whole import Whole

            reason = refusal(self._layout, self._preconditioner, self._precondition, active)
            if reason is None and (self._whole is None or self._whole.device != device):
                self._read_counters()
                self._whole = Whole(self._layout, self._precondition, device, self._capturable)
        if reason is not None:
            self._read_counters()
            self._whole = None  # if it is wanted again, it counts on from the states
            if self._capturable:
                graphs.refuse_kernels(reason)
            if kernels.NAME == "triton" and not self._warned:
                self._warned = True
                warnings.warn(
                    f"the Triton kernels have no step for {reason}: this optimizer runs plain torch kernels, tensor by "
                    'tensor, which are many times slower on a GPU. backend="reference" silences this',
                    stacklevel=2,
                )
        return self._whole

    def _fit(self, memory_budget: int | str) -> None:
        """Take the largest window that fits."""
        params = [ref.param for ref in self._refs() if ref.param.requires_grad]
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

    def _units(self) -> list[list[ParamRef]]:
        """Parameters that share a preconditioner. One without a gradient takes part, with a row of zeros."""
        refs = [m for m in self._refs() if m.group["preconditioned"] and self.state.get(m.param)]
        if self._structure["scope"] == "layer":
            return [[ref] for ref in refs if ref.param.grad is not None]
        return [refs] if any(ref.param.grad is not None for ref in refs) else []

    def _allocate(self, active: list[ParamRef]) -> None:
        """Make the state of the parameters that have none."""
        for ref in active:
            group, param, state = ref.group, ref.param, self.state[ref.param]
            if not state:
                fresh = self._layout.fresh(ref, param.device)
                if group["preconditioned"] and (
                    self._structure["scope"] == "layer" or not self._gram_state(self._refs())
                ):
                    # With a parameter, since a checkpoint keeps nothing that no parameter owns.
                    fresh |= self._layout.gram_state(param.device)
                state.update(fresh)  # all of it or, if memory runs out, nothing
            elif group["preconditioned"] and group[checks.HEAVY_BALL] and "momentum" not in state:  # switched on since
                state.update(shards.allocate(param, layout.momentum, param.device))

    def _gram_state(self, refs: Iterable[ParamRef]) -> dict[str, Any]:
        """The state that holds what a unit has in common; empty before the first step."""
        return next((self.state[m.param] for m in refs if "pushed" in self.state.get(m.param, ())), {})

    def _leaves(self, unit: list[ParamRef]) -> list[Leaf]:
        views = ((m, shards.view(self.state[m.param], m.param, self._layout.maker(m))) for m in unit)
        return [Leaf(state, local(m.param).shape, m) for m, state in views]
