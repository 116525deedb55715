"""Any order of steps, saves, loads, skips, frozen and added parameters, against brute force after every move."""

import copy

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from naive import NaiveMFAC
from papers import SparseMFAC
from problems import flat, set_gradients
from states import through_a_file

SHAPES = [(3, 4), (5,), (), (2, 2)]
SETTINGS = dict(num_grads=3, density=0.4, block_size=4, damp=1e-2)
POSITIONS = st.integers(0, len(SHAPES) - 1)
RATES = st.sampled_from([0.0, 0.01, 0.05, 0.2])


class Model(NaiveMFAC):
    """Brute force that knows what a skipped step and a new parameter are, and counts."""

    def __init__(self, thetas, **settings_):
        super().__init__(thetas, **settings_)
        self.pushed = self.skipped = 0
        self.travelled = 0.0

    def step(self, gradients):
        given = [gradient for gradient in gradients if gradient is not None]
        if not given:
            return
        if not all(torch.isfinite(gradient).all() for gradient in given):
            self.skipped += 1
            return
        before = flat(self.thetas)
        super().step(gradients)
        self.pushed += 1
        self.travelled += (flat(self.thetas) - before).norm().item()

    def add(self, theta, lr):
        """A parameter that was there all the time without a gradient."""
        fresh = theta.detach().double().reshape(-1).clone()
        self.shapes.append(theta.shape)
        self.thetas.append(fresh)
        self.errors.append(torch.zeros_like(fresh))
        self.velocity.append(torch.zeros_like(fresh))
        self.lr.append(lr)
        self.weight_decay.append(0.0)
        self.rows = [torch.cat([row, torch.zeros_like(fresh)]) for row in self.rows]


class Machine(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 99), value_dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def start(self, seed, value_dtype):
        generator = torch.Generator().manual_seed(seed)
        self.settings = {**SETTINGS, "value_dtype": value_dtype}
        self.start = [torch.randn(shape, generator=generator) for shape in SHAPES]
        self.params = [torch.nn.Parameter(theta.clone()) for theta in self.start[:3]]
        self.optimizer = self.build(self.params)
        decays = [0.1, 0.0, 0.0]
        self.model = Model(self.params, lr=[0.05, 0.02, 0.02], momentum=0.5, weight_decay=decays, **self.settings)
        self.saved = None

    def build(self, params):
        groups = [{"params": params[:1], "lr": 0.05, "weight_decay": 0.1}, {"params": params[1:3]}]
        groups += [{"params": params[3:]}] if len(params) > 3 else []
        return SparseMFAC(groups, 0.02, momentum=0.5, nonfinite="skip", **self.settings)

    def gradients(self, seed, missing=frozenset()):
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(param.shape, generator=generator) for param in self.params]
        return [
            None if position in missing or not param.requires_grad else gradient
            for position, (gradient, param) in enumerate(zip(drawn, self.params, strict=True))
        ]

    def step_both(self, gradients):
        set_gradients(self.params, gradients)
        self.optimizer.step()
        self.model.step(gradients)

    @rule(seed=st.integers(0, 10**6))
    def step(self, seed):
        self.step_both(self.gradients(seed))

    @rule(seed=st.integers(0, 10**6), missing=st.sets(POSITIONS, min_size=1))
    def step_without_some_gradients(self, seed, missing):
        self.step_both(self.gradients(seed, missing))

    @rule(seed=st.integers(0, 10**6), at=POSITIONS, value=st.sampled_from([float("nan"), float("inf")]))
    def step_with_a_bad_gradient(self, seed, at, value):
        gradients = self.gradients(seed)
        present = [gradient for gradient in gradients if gradient is not None]
        if present:
            present[at % len(present)].view(-1)[-1] = value
        self.step_both(gradients)

    @rule(group=st.integers(0, 2), lr=RATES)
    def change_the_learning_rate(self, group, lr):
        group %= len(self.optimizer.param_groups)
        self.optimizer.param_groups[group]["lr"] = lr
        for position in ([0], [1, 2], [3])[group]:
            self.model.lr[position] = lr

    @rule(at=POSITIONS)
    def freeze(self, at):
        param = self.params[at % len(self.params)]
        param.requires_grad_(False)
        param.grad = None

    @rule(at=POSITIONS)
    def thaw(self, at):
        self.params[at % len(self.params)].requires_grad_(True)

    @precondition(lambda self: len(self.params) == 3)
    @rule()
    def add_a_group(self):
        self.params.append(torch.nn.Parameter(self.start[3].clone()))
        self.optimizer.add_param_group({"params": self.params[3:]})
        self.model.add(self.start[3], 0.02)

    @rule()
    def save(self):
        values = [param.detach().clone() for param in self.params]
        frozen = [not param.requires_grad for param in self.params]
        self.saved = through_a_file(self.optimizer.state_dict()), values, frozen, copy.deepcopy(self.model)

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self):
        """As a new process does, into parameters and an optimizer that never stepped."""
        state_dict, values, frozen, model = self.saved
        self.params = [torch.nn.Parameter(value.clone()) for value in values]
        self.optimizer = self.build(self.params)
        self.optimizer.load_state_dict(state_dict)
        for param, still in zip(self.params, frozen, strict=True):
            param.requires_grad_(not still)
        self.model = copy.deepcopy(model)

    @precondition(lambda self: self.saved is not None and len(self.saved[1]) == len(self.params))
    @rule()
    def go_back(self):
        """Into the optimizer that is running."""
        state_dict, values, frozen, model = self.saved
        with torch.no_grad():
            for param, value, still in zip(self.params, values, frozen, strict=True):
                param.copy_(value)
                param.requires_grad_(not still)
                param.grad = None
        self.optimizer.load_state_dict(state_dict)
        self.model = copy.deepcopy(model)

    @invariant()
    def is_brute_force(self):
        if not hasattr(self, "model"):
            return  # before the first move
        states = [self.optimizer.state.get(param, {}) for param in self.params]
        for state, error, shape in zip(states, self.model.errors, self.model.shapes, strict=True):
            found = state.get("error", torch.zeros(shape))
            assert torch.equal(found.double(), error.view(shape))
        gram_states = [state for state in states if "pushed" in state]
        assert [state["pushed"] for state in gram_states] == ([self.model.pushed] if self.model.pushed else [])
        assert self.optimizer.skipped_steps == self.model.skipped
        assert [group["lr"] for group in self.optimizer.param_groups] == [
            self.model.lr[position] for position in (0, 1, 3) if position < len(self.params)
        ]
        apart = (flat(self.params) - flat(self.model.thetas)).norm().item()
        assert apart <= 1e-5 * self.model.travelled + 1e-6 * (1 + self.model.pushed)
        if gram_states:
            newest = (self.model.pushed - 1) % 3
            gram = gram_states[0]["gram"]
            row = self.model.rows[-1]
            assert abs(gram[newest, newest].item() - (row @ row).item()) <= 1e-12 * (row @ row).item()


TestAnyOrder = Machine.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, derandomize=True, deadline=None)
