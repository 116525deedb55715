"""Pictures of comparisons and benchmarks: colours, axes and labels say what was measured, and no more than that."""

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, instead of files."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    return figures


def one_run(optimizer, value, size=8.0):
    history = [{"step": step, "seconds": 0.1 * step, "loss": 1.0 / step} for step in range(1, 9)]
    return {
        **{"optimizer": optimizer, "history": history, "parameters": 10, "seconds_per_step": 0.1},
        **{"metrics": {"accuracy": value, "loss": 0.5}, "optimizer_memory": {"total": 10 * size}},
    }


OPTIMIZERS = {"ours": "lowrank_mfac", "off": "lowrank_mfac", "paper": "sparse_mfac", "AdamW": "adamw_torch"}


def results(recipe, values):
    """A result for each optimizer on each task."""
    return [
        recipe.report.Result(
            *(task, "accuracy", label, name == "adamw_torch", (1e-3,), 1e-3, (1,)),
            runs=(one_run(name, value, 2.0 + number),),
            failures=(),
        )
        for task, value in values.items()
        for number, (label, name) in enumerate(OPTIMIZERS.items())
    ]


def curves(recipe, values):
    points = {1e-4: 0.5, 1e-3: 1.0}
    return [
        recipe.report.Curve(
            *(task, "accuracy", label, recipe.families.family(name)),
            {rate: (value * share,) for rate, share in points.items()},
            dict.fromkeys(points, (0.7,)),
        )
        for task, value in values.items()
        for label, name in OPTIMIZERS.items()
    ]


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]


def span(limits):
    return limits[1] - limits[0]


def test_a_task_on_which_nothing_was_learned_has_no_panel(recipe, drawn):
    values = {"cola": 0.0, "mrpc": 0.8}
    recipe.figures.plot_metrics("x.png", results(recipe, values))
    recipe.figures.plot_memory("x.png", results(recipe, values))
    recipe.figures.plot_rates("x.png", curves(recipe, values))
    assert [titles(figure) for figure in drawn] == [["mrpc"], ["mrpc"], ["mrpc: accuracy", "mrpc: loss"]]
    recipe.figures.plot_metrics("x.png", results(recipe, {"cola": 0.0}))
    assert titles(drawn[-1]) == ["cola"]  # rather than nothing


def test_an_axis_of_a_metric_is_not_magnified(recipe, drawn):
    shown = results(recipe, {"mrpc": 0.81})
    recipe.figures.plot_metrics("x.png", shown)
    recipe.figures.plot_memory("x.png", shown)
    metrics, memory = (figure.axes[0] for figure in drawn)
    for limits in (metrics.get_xlim(), memory.get_ylim()):
        assert span(limits) == pytest.approx(0.1)
        assert sum(limits) / 2 == pytest.approx(0.81, abs=1e-3)
    assert recipe.plots.wide((0.2, 0.9)) == (0.2, 0.9)


@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_no_picture_is_wider_than_a_page_shows(recipe, drawn, tasks):
    values = {f"task {number}": 0.6 for number in range(tasks)}
    recipe.figures.plot_metrics("x.png", results(recipe, values))
    recipe.figures.plot_memory("x.png", results(recipe, values))
    recipe.figures.plot_rates("x.png", curves(recipe, values))
    recipe.figures.plot_losses("x.png", results(recipe, {"task 0": 0.6}) * 3, "seconds")
    assert [figure.get_figwidth() for figure in drawn] == [recipe.plots.WIDTH] * 4
    assert all(len([t for t in titles(figure) if t]) >= tasks for figure in drawn[:3])


def test_a_colour_means_the_same_in_every_picture(recipe, drawn):
    colours = {name: colour for name, (colour, *_) in recipe.families.FAMILIES.items()}
    recipe.figures.plot_rates("x.png", curves(recipe, {"sst2": 0.8}))
    lines = {line.get_label(): line for line in drawn[0].legends[0].get_lines()}
    found = {text.get_text(): line for text, line in zip(drawn[0].legends[0].get_texts(), lines.values(), strict=False)}
    assert len(found) == len(OPTIMIZERS)
    for label, line in found.items():
        assert to_hex(line.get_color()).upper() == colours[recipe.families.family(OPTIMIZERS[label])]
    assert found["ours"].get_linestyle() != found["off"].get_linestyle()  # a family of two

    history = one_run("x", 0.5)["history"]
    history = [*history, {"step": 8, "eval_accuracy": 0.5}]
    recipe.plots.plot_training(
        "x.png", "t", "accuracy", [("adamw_torch, lr 1", history), ("sparse_mfac, lr 1", history)]
    )
    used = [to_hex(line.get_color()).upper() for line in drawn[1].axes[1].get_lines()]
    assert used == [colours["stock"], colours["sparse"]]

    figures = recipe.bench_figures
    assert not set(figures.STEP_PARTS.values()) & set(figures.MEMORY_PARTS.values())
    assert len(set(figures.STEP_PARTS.values())) == len(figures.STEP_PARTS)
    assert not {figures.WHOLE, figures.BACKWARD} & {*figures.STEP_PARTS.values(), *figures.MEMORY_PARTS.values()}


def test_families(recipe):
    names = ("sparse_ggt", "lowrank-mfac", "dense_mfac", "microadam", "adamw_torch", "muon")
    assert [recipe.families.family(name) for name in names] == [
        *("sparse", "lowrank", "dense", "other", "stock", "stock")
    ]


def test_labels_are_the_measured_step_and_not_the_sum_of_its_parts(recipe, drawn):
    """The medians of parts add up to 0.9 s, and the median step took 1.5 s."""
    parts = dict.fromkeys((*recipe.bench_measure.PARTS, "rest"), 0.9 / (len(recipe.bench_measure.PARTS) + 1))
    memory = {**dict.fromkeys(("indices", "values", "error", "momentum", "metric", "gram"), 10), "total": 60}
    timing = recipe.bench_report.Timing("one", "x", "", 1.5, parts, [1.5], 0.0, 0, memory, 0.6, 0)
    training = {"one": {"forward_backward": 2.0, "optimizer": 1.0, "whole": 3.7}}
    report = recipe.bench_report.Report({"cpu": "c"}, 100, 0.1, "m", [timing], training=training)
    recipe.bench_figures.plot_report("x.png", report)
    texts = [[text.get_text().strip() for text in axes.texts] for axes in drawn[0].axes]
    assert texts == [["1.5 s"], ["0.6"], ["3.70 s"]]
    assert drawn[0].get_figwidth() == recipe.plots.WIDTH
