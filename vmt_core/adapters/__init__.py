"""Tuned methods: what is trained on one reference, and how.

settings.py            what can be set, and presets
head_types.py          which attention heads look within a frame, and which along time
masked_lora.py         LoRA on chosen heads only, with peft
files.py               the folder of an adapter
follow_your_motion.py  the stages of Follow-Your-Motion / EffiVMT
"""
