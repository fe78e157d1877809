"""One HTML file that shows a run, or several beside each other: `tsdkd report`.

`load` reads a run's directory, `findings` says in words how it went, `charts` draws, `tokens` packs records for the
token view, `page` puts them together.
"""
