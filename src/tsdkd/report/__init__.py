"""One HTML file about a run, or about several runs side by side: `tsdkd report`.

`load` reads a run's directory. `summary` and `findings` say how the run went. `chart_specs` lists the charts of the
log, `charts` computes their lines, and charts.js draws them. `figures` draws the papers' figures. `tokens` packs
records for the token view, which tokens.js shows. `page` writes the file.
"""
