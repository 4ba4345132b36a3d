"""What enters, flows and leaves, as pydantic models; imports nothing of the project.

    references + prompts ──plan──▶ ManifestRow (one video to make) ──transfer──▶ ResultRow (ok or failed, with reasons)

`rows.py` the rows and their Arrow schemas · `errors.py` why a row fails · `settings.py` every setting of every job ·
`cli.py` settings from a YAML file, then the environment, then the command line.
"""

from schemas.errors import ErrorCode, RowError, UsageError
from schemas.rows import ManifestRow, Reference, ResultRow, Row, WorldClip, sample_id
from schemas.settings import (
    LimitSettings,
    PlanSettings,
    PretrainSettings,
    RaySettings,
    StageSettings,
    StorageSettings,
    SynthesizeSettings,
    TransferSettings,
)

__all__ = [
    "ErrorCode",
    "LimitSettings",
    "ManifestRow",
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
    "TransferSettings",
    "UsageError",
    "WorldClip",
    "sample_id",
]
