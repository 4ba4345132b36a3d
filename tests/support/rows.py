"""Rows of measurements that no video stands behind."""

from schemas import MetricRow


def metric_row(method, number, *, settings="{}", run="/out", category="single", status="ok", **values):
    """The video of a method on the number-th reference."""
    identity = hash((run, method, settings, number, *map(str, values.values())))
    return MetricRow(
        sample_id=f"{abs(identity):032x}"[:32], run=run, status=status, method=method,
        method_settings=settings, prompt="a red circle", seed=0, category=category, reference_uri=f"/clip{number}.mp4",
        reference_digest=str(number), model="wan-nano", model_revision="r",
        **{"pair": str(number), "sampling": '{"steps": 20}', **values},
    )  # fmt: skip
