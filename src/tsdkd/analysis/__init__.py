"""The papers' figures from records of a run, or of any two models: `tsdkd analyze`.

`load` reads records, `figures` says what each shows and draws it.
"""
