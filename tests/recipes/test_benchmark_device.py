"""The benchmark on a GPU, with a clock that is none: what is timed, filled, counted and written."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification


class FakeClock:
    """A device on which everything takes as many milliseconds as there were calls before."""

    def __init__(self):
        self.device, self.calls, self.warm = torch.device("cpu"), 0, 0

    def seconds(self, work):
        work()
        self.calls += 1
        return self.calls / 1000

    def peak(self, work):
        work()
        return 5_000_000

    def captured(self, work):
        work()
        return work

    def describe(self):
        return {"card": "none", "cuda": "none"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)).train()


def test_cases_are_timed_with_full_windows(recipe, model, monkeypatch):
    bench, pushed = recipe.bench_device, []
    cases = [
        recipe.bench_cases.Case(bench.ADAMW, "adamw"),
        recipe.bench_cases.Case("low-rank", "lowrank_mfac", "num_grads=4"),
        recipe.bench_cases.Case("sparse", "sparse_mfac", "num_grads=5"),
    ]
    built = bench._build

    def noted(case, model):
        optimizer = built(case, model)
        pushed.append((case.label, optimizer))
        return optimizer

    monkeypatch.setattr(bench, "_build", noted)
    before = [param.detach().clone() for param in model.parameters()]
    report = bench.measure_device(FakeClock(), model, cases, repeats=2, batch=2, length=8, seed=0)

    for old, param in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, param.detach())  # learning rate 0: all train the same model
    assert pushed[0][1].defaults["fused"]
    for label, optimizer in pushed[1:]:
        capacity = optimizer.param_groups[0]["num_grads"]
        steps = [state["pushed"] for state in optimizer.state.values() if "pushed" in state]
        # the window, the peak, what warms up, the steps, and the training steps
        assert set(steps) == {capacity + 1 + 3 + 2 + 2}, label
    # 5 passes, then 4 timings of each case.
    assert report["forward_backward"] == [0.004, 0.005]
    assert [line["steps"] for line in report["lines"]] == [[0.006, 0.007], [0.01, 0.011], [0.014, 0.015]]
    assert [line["whole"] for line in report["lines"]] == [[0.008, 0.009], [0.012, 0.013], [0.016, 0.017]]
    # then 5 copies, of which 3 warm up: calls 21 and 22
    assert report["bandwidth"] == pytest.approx(2 * 2**20 / 21.5e-3)
    count = report["machine"]["parameters"]
    assert count == sum(param.numel() for param in model.parameters())
    adamw, low_rank, _ = report["lines"]
    assert adamw["state"] == 8 * count + 4 * len(before)
    assert adamw["moved"] == adamw["state"] + 12 * count
    assert low_rank["state"] == pushed[1][1].memory()["total"]

    table = bench.device_markdown(report)
    assert "| AdamW (fused) | torch | 6.500 |" in table
    low_rank_line = next(line for line in table.splitlines() if line.startswith("| low-rank"))
    assert low_rank_line.startswith("| low-rank | numba | 10.500 |")
    assert "| 1.62 | 12.50 |" in low_rank_line  # of AdamW's, and of a training step
    assert low_rank_line.endswith("| 5 |")


def test_windows_of_16_to_1024_gradients_are_cases(recipe):
    labels = [case.label for case in recipe.bench_device.CASES]
    assert labels[0] == "AdamW (fused)"
    for m in (16, 64, 256, 1024):
        assert f"low-rank M-FAC, m = {m}" in labels
        assert f"sparse M-FAC, m = {m}" in labels


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(recipe, tmp_path):
    with pytest.raises(SystemExit, match="needs a GPU that torch can use"):
        recipe.benchmark_step.main(["--device", "cuda", "--output_dir", str(tmp_path)])


def test_steps_in_a_graph_keep_the_gradients_in_their_place(recipe, model, monkeypatch):
    bench, built, seen = recipe.bench_device, recipe.bench_device._build, set()
    case = next(case for case in bench.CASES if case.label == "low-rank M-FAC, m = 16, in a CUDA graph")
    assert case.options == "num_grads=16,nonfinite=ignore,capturable=true"

    def without(case, model):
        """A CPU has no graphs."""
        optimizer = built(recipe.bench_cases.Case(case.label, case.optimizer, "num_grads=16"), model)
        stepped = optimizer.step

        def step():
            seen.add(tuple(param.grad.data_ptr() for param in model.parameters()))
            stepped()

        monkeypatch.setattr(optimizer, "step", step)
        monkeypatch.setattr(bench, "_fill", lambda *_: (fill(optimizer, model), seen.clear()))
        return optimizer

    fill = bench._fill
    monkeypatch.setattr(bench, "_build", without)
    report = bench.measure_device(FakeClock(), model, [case], repeats=3, batch=2, length=8, seed=0)
    assert len(seen) == 1
    assert len(report["lines"][0]["steps"]) == len(report["lines"][0]["whole"]) == 3
