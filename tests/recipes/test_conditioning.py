"""The ill-conditioned problems: their spectra and floors, the search for a rate, and a study from end to end."""

import json
import math

import pytest
import torch


@pytest.fixture
def problems(recipe):
    return recipe.conditioning_problems


@pytest.fixture
def conditioning(recipe):
    threads = torch.get_num_threads()
    yield recipe.conditioning
    torch.set_num_threads(threads)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_the_features_have_the_condition_number_that_was_asked_for(problems, condition):
    problem = problems.logistic(condition, True, 20_000, 8, 0)
    inputs = problem.inputs.double()
    spectrum = torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs))
    assert float(spectrum[-1]) == pytest.approx(1.0, rel=0.3)
    assert float(spectrum[-1] / spectrum[0]) == pytest.approx(condition, rel=0.4)


def test_a_rotation_hides_the_conditioning_from_a_diagonal(problems):
    turned, aligned = (problems.logistic(1e4, rotated, 20_000, 8, 0).inputs.double() for rotated in (True, False))
    variances = [inputs.square().mean(0) for inputs in (turned, aligned)]
    assert float(variances[0].max() / variances[0].min()) < 100
    assert float(variances[1].max() / variances[1].min()) == pytest.approx(1e4, rel=0.4)
    # Divided by its diagonal, the aligned covariance is the identity, and the turned one is as bad as before.
    for inputs, worst in ((turned, 1e2), (aligned, 1.0)):
        scaled = inputs / inputs.square().mean(0).sqrt()
        spectrum = torch.linalg.eigvalsh(scaled.T @ scaled / len(scaled))
        assert float(spectrum[-1] / spectrum[0]) >= worst
    assert float(spectrum[-1] / spectrum[0]) < 1.5
    assert (aligned == 0).double().mean() == pytest.approx(0.9, abs=0.02)


def test_the_floor_is_the_least_loss(problems):
    problem = problems.logistic(1e2, True, 400, 4, 1)
    weights = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
    every = torch.arange(400)

    def closure():
        optimizer.zero_grad()
        loss = problem.loss((problem.inputs.double() @ weights)[:, None], every)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure().item() == pytest.approx(problem.floor, abs=1e-7)
    assert problem.floor < math.log(2.0) - 0.01
    with pytest.raises(ValueError, match="Newton's method ended at a gradient of .*: the labels are separable"):
        problems.newton(torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64), steps=5)
    with pytest.raises(ValueError, match=r"a condition number is at least 1: 0.5"):
        problems.logistic(0.5, True, 10, 2, 0)


def test_the_network_is_as_deep_as_asked_and_one_problem_for_a_seed(problems):
    first, again, other = (problems.network(5, 64, 6, seed) for seed in (0, 0, 1))
    assert sum(isinstance(layer, torch.nn.Tanh) for layer in first.model) == 5
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, other.inputs)
    every = torch.arange(64)
    mean = first.loss(torch.zeros(64, 1), every)
    assert float(mean) == pytest.approx(1.0, rel=0.02)  # the variance of the targets
    with pytest.raises(ValueError, match="at least one hidden layer: 0"):
        problems.network(0, 4, 4, 0)


@pytest.mark.parametrize("best", [-7, -1, 0, 0.5, 3, 8])
def test_the_search_finds_the_best_rate_to_a_factor_of_two(conditioning, best):
    tried = []

    def measure(rate):
        tried.append(rate)
        return abs(math.log2(rate) / 2 - best)

    rate, inside = conditioning.search(1.0, measure)
    assert inside
    assert abs(math.log2(rate) / 2 - best) <= 0.25
    assert len(set(tried)) == len(tried)
    assert len(tried) <= conditioning.MOST_RATES + 2


def test_a_search_without_an_end_says_so(conditioning):
    rate, inside = conditioning.search(1.0, lambda rate: -rate, most=5)
    assert not inside
    assert rate == 2 * 4.0**3
    assert conditioning.search(1.0, lambda rate: math.inf if rate > 0.1 else rate)[0] < 0.1


@pytest.mark.parametrize("best", [-4, 4])
def test_a_search_leaves_a_plateau_where_all_rates_are_about_the_same(conditioning, best):
    def measure(rate):
        power = math.log2(rate) / 2
        return 0.1 if power == best else 0.9 + 0.001 * abs(power)  # least of the plateau: where the search begins

    assert conditioning.search(1.0, measure) == (1.0, True)
    assert conditioning.search(1.0, measure, enough=0.5) == (4.0**best, True)
    tried = []
    assert conditioning.search(1.0, lambda rate: tried.append(rate) or measure(rate), enough=0.05)[0] == 4.0**best
    assert len(tried) == conditioning.MOST_RATES + 2


def test_a_study_from_end_to_end(conditioning, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(conditioning, "EXAMPLES", 256)
    monkeypatch.setattr(conditioning, "FEATURES", 4)
    labels = ("AdamW", "dense M-FAC", "dense, matrix off")
    study = conditioning.STUDIES["rotated"]
    small = type(study)(study.title, study.axis, (1e1, 1e3), study.make, labels)
    monkeypatch.setitem(conditioning.STUDIES, "rotated", small)

    def main(*argv):
        monkeypatch.setattr("sys.argv", ["conditioning", "--studies", "rotated", "--output_dir", str(tmp_path), *argv])
        conditioning.main()

    main("--steps", "25", "--seeds", "1", "2", "--points", "10")
    runs = [json.loads(line) for line in (tmp_path / "conditioning.jsonl").read_text().splitlines()]
    assert {run["label"] for run in runs} == set(labels)
    assert {run["key"]["point"] for run in runs} == {10}
    by_label = {label: [run for run in runs if run["label"] == label] for label in labels}
    for label, own in by_label.items():
        searched = [run for run in own if run["key"]["seed"] == 0]
        best = min(searched, key=lambda run: math.inf if run["gap"] is None else run["gap"])
        reported = [run for run in own if run["key"]["seed"] > 0]
        assert [run["key"]["seed"] for run in reported] == [1, 2]
        assert {run["key"]["learning_rate"] for run in reported} == {best["key"]["learning_rate"]}, label
        assert all(run["gap"] < 0.9 for run in reported), label
        assert best["gap"] < 0.3, label
        assert all(run["reached"] is None or 1 <= run["reached"] <= 25 for run in own)
    text = (tmp_path / "conditioning.md").read_text()
    cells = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1] for line in text.splitlines() if "|" in line
    }
    gaps = [100 * run["gap"] for run in by_label["AdamW"] if run["key"]["seed"] > 0]
    shown = cells["AdamW"].replace("*", "").split(" ")[0]
    assert float(shown) == pytest.approx(max(sum(gaps) / 2, 0.0), rel=0.06, abs=1e-3)
    assert sum(cell.startswith("**") for cell in cells.values()) == 1
    assert (tmp_path / "conditioning.png").stat().st_size > 20_000

    # A second start runs nothing, and with --collect not even what is not there.
    before = len(runs)
    main("--steps", "25", "--seeds", "1", "2", "--points", "10")
    assert len((tmp_path / "conditioning.jsonl").read_text().splitlines()) == before
    assert "[3/3] rotated 10, dense, matrix off" in capsys.readouterr().out
    (tmp_path / "conditioning.md").unlink()
    main("--steps", "25", "--seeds", "1", "2", "--collect")
    assert (tmp_path / "conditioning.md").read_text() == text
    assert len((tmp_path / "conditioning.jsonl").read_text().splitlines()) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", "0", "1"], r"--seeds must be others than 0, each once: \[0, 1\]"),
        (["--seeds", "1", "1"], "each once"),
        (["--steps", "0"], "--steps must be at least 1: 0"),
    ],
)
def test_wrong_arguments_are_refused(conditioning, monkeypatch, argv, message):
    monkeypatch.setattr("sys.argv", ["conditioning", *argv])
    with pytest.raises(ValueError, match=message):
        conditioning.main()


def test_a_run_that_diverges_has_no_gap(conditioning):
    run = conditioning.Case("depth", 4, "SGD, momentum 0.9", 20).run(1e30, 1)
    assert run["gap"] is None or run["gap"] > 1e3
    assert conditioning.gap_of(run) > 1e3
    windowed = conditioning.Case("window", 32, "dense GGT", 20)
    assert windowed.options["num_grads"] == 32
    assert conditioning.Case("rotated", 10, "dense GGT", 20).options["num_grads"] == 128
