"""Checkpoints: written atomically, verified, free of pickles (DeepSpeed's are restricted).

The state comes from `_get_extra_state` of the trainer; `tsdkd.run.output_dir` chooses the checkpoint of a resumed
run.
"""
