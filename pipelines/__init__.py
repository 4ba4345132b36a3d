"""Ray only here: what the jobs do, on Ray Data and Ray Train, and every byte in and out.

    MANIFEST ──read──▶ [skip what is committed] ──▶ Encode ──▶ Transfer ──▶ Finish ──▶ OUT/results (one commit per block)
                                                   latents    latents      mp4 + row

One module for each job: `plan`, `transfer`, `tune`, `evaluate`, `bench`, `synthesize`, `pretrain`. Beside them:
`stage.py`, `stages.py` the actors of transfer · `tracker.py` attempts, quarantine, progress · `ledger.py` what is done ·
`prepare.py`, `training.py`, `engine.py` how adapters are made · `measure.py` actors of evaluate · `tables.py`, `formats.py` comparisons ·
`report.py`, `plots.py` the page to look at · `references.py`, `suites.py`, `manifest.py`, `adapters.py` what is read ·
`storage.py` local disk and S3 alike · `lock.py` one run at a time · `cluster.py`, `watch.py` Ray · `models.py` weights on a node.
"""
