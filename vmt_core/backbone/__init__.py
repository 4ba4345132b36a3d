"""The model that everything runs on.

weights.py   where a model lies, and its revision
wan.py        load · pixels <-> latents · captions · velocity      (`Backbone`)
taps.py       features with an early exit, for guidance
sampler.py    the one sampling loop: Euler flow matching
positions.py  frames at other places in time than 0, 1, 2, …
geometry.py   token grid, taps
nano.py       wan-nano, the embedded model
"""
