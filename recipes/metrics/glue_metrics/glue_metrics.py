"""The metrics of the GLUE tasks for the evaluate library, which needs no Hub to load them from here.

    metric = evaluate.load("recipes/metrics/glue_metrics", "mrpc")
    metric.compute(predictions=[0, 1], references=[0, 1])

`hf_efcp.glue.compute_metrics` is what the recipes call, and what does the work here.
"""

# The loader copies this file, and reads its imports line by line: one module a line, and none relative to this file.
import datasets
import evaluate

from hf_efcp.glue import compute_metrics, get_task


class GlueMetrics(evaluate.Metric):
    """What a GLUE task reports; the second argument of `evaluate.load` names the task."""

    def _info(self) -> evaluate.MetricInfo:
        task = get_task(self.config_name)
        value = datasets.Value("float64" if task.regression else "int64")
        return evaluate.MetricInfo(
            description=f"The metrics of {task.name}: {', '.join(task.metrics)}.",
            citation="Wang et al., GLUE: A Multi-Task Benchmark and Analysis Platform for NLU, arXiv 1804.07461",
            inputs_description="predictions and references: class numbers, or in regression values, one per example",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return compute_metrics(get_task(self.config_name), predictions, references)
