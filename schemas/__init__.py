"""What enters, flows and leaves, as pydantic models; imports nothing of the project.

    references + prompts ──plan──▶ ManifestRow (one video to make) ──transfer──▶ ResultRow (ok or failed, with reasons)

`rows.py` the rows and their Arrow schemas · `errors.py` why a row fails · `settings.py` every setting of every job,
`sections.py` those that several share ·
`cli.py` settings from a YAML file, then the environment, then the command line.
"""

from schemas.errors import ErrorCode, RowError, UsageError, first_fault
from schemas.rows import AdapterRow, ManifestRow, MetricRow, Reference, ResultRow, Row, WorldClip, sample_id
from schemas.sections import (
    DeepSpeedSettings,
    LimitSettings,
    RaySettings,
    StageSettings,
    StorageSettings,
    TrainingSettings,
)
from schemas.settings import (
    BenchSettings,
    EvaluateSettings,
    JobSettings,
    MeasuringSettings,
    PlanSettings,
    PretrainSettings,
    SynthesizeSettings,
    TransferSettings,
    TuneSettings,
)

__all__ = [
    "AdapterRow",
    "BenchSettings",
    "DeepSpeedSettings",
    "ErrorCode",
    "EvaluateSettings",
    "JobSettings",
    "LimitSettings",
    "ManifestRow",
    "MeasuringSettings",
    "MetricRow",
    "PlanSettings",
    "PretrainSettings",
    "RaySettings",
    "Reference",
    "ResultRow",
    "Row",
    "RowError",
    "StageSettings",
    "StorageSettings",
    "SynthesizeSettings",
    "TrainingSettings",
    "TransferSettings",
    "TuneSettings",
    "UsageError",
    "WorldClip",
    "first_fault",
    "sample_id",
]
