"""The papers' figures from records of a run, or of any two models: `tsdkd analyze`.

`load` reads records, `figures` computes and plots, `write_figures` writes, `record_pair` makes records of two models,
of which `token_roles` makes a table (`decisive` replaces tokens).
"""
