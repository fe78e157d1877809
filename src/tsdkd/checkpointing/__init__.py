"""Checkpoints that are written atomically, verified, and free of pickles (DeepSpeed's pickles are restricted).

The state comes from the trainer's `_get_extra_state`. `tsdkd.run.output_dir` chooses the checkpoint to resume from.
"""
