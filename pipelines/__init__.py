"""Ray only here: the Ray Data graph of the main job, its actors, and storage.

    MANIFEST ──read──▶ [skip what is committed] ──▶ Encode ──▶ Transfer ──▶ Finish ──▶ OUT/results (one commit per block)
                                                   latents    latents      mp4 + row

`transfer.py` the run · `stages.py` the three actors · `tracker.py` attempts, quarantine, progress · `ledger.py` what is done ·
`plan.py` manifests · `storage.py` every byte in and out · `models.py` weights on a node · `report.py` the page to look at.
"""
