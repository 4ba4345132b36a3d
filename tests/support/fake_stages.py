"""Stage actors without a model: everything around the computation is real. A row's prompt says what happens to it.

    "ok …"     is made, in VMT_TEST_SECONDS per row (default 0)
    "crash …"  kills its worker, each time
    "flaky …"  kills its worker the first time
    "hang …"   never returns
    "oom …"    runs out of memory unless it is alone and careful
    "always oom …", "raise …", "nan …"  fail as they say

Every row that a denoiser sees is appended to the file VMT_TEST_LOG. With VMT_TEST_BROKEN_START no denoiser starts.
"""

import os
import time

from pipelines.stage import LastStage, Stage
from pipelines.storage import join
from schemas import ErrorCode, RowError


class Encode(Stage):
    name = "encode"

    def setup(self):
        pass

    def work(self, rows, *, smaller):
        return [{"payload": row["prompt"].encode()} for row in rows]


class Transfer(Stage):
    name = "transfer"

    def setup(self):
        if os.environ.get("VMT_TEST_BROKEN_START"):
            raise FileNotFoundError("the weights are gone")

    def groups(self, rows):
        return [rows] if rows else []

    def work(self, rows, *, smaller):
        for row in rows:
            log(f"{row['sample_id']} {os.getpid()} {len(rows)}")
            time.sleep(float(os.environ.get("VMT_TEST_SECONDS", "0")))
            kind = row["prompt"].rsplit(" ", 1)[0]
            if kind == "crash" or (kind == "flaky" and row["attempts"] == 1):
                os.kill(os.getpid(), 9)
            if kind == "hang":
                time.sleep(1e6)
            if kind == "always oom" or (kind == "oom" and (len(rows) > 1 or not smaller)):
                raise MemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            if kind == "raise":
                raise ZeroDivisionError("division by zero")
        return [
            RowError(ErrorCode.NON_FINITE, "NaN in the latents")
            if row["prompt"].startswith("nan")
            else {"payload": b"latents", "evaluations": 4, "denoiser_calls": 1}
            for row in rows
        ]


class Finish(LastStage):
    name = "finish"

    def setup(self):
        pass

    def work(self, rows, *, smaller):
        (row,) = rows
        uri = join(self.settings.output, "videos", f"method={row['method']}", f"{row['sample_id']}.mp4")
        self.storage.write(uri, row["sample_id"].encode())
        return [{"video_uri": uri, "video_bytes": 32}]


def log(line):
    if path := os.environ.get("VMT_TEST_LOG"):
        with open(path, "a") as file:
            file.write(line + "\n")
