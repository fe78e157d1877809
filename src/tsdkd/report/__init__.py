"""One HTML file that shows a run, or several beside each other: `tsdkd report`.

`gather` reads what a run has left, `verdict` says in words how it went, `charts` draws, `tokens` packs records for the
token view, `page` puts them together.
"""
