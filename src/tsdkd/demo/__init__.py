"""A complete toy to try the library on: a reasoning task, a teacher, a student and prompts (a few MB in all).

`scripts/dev/build_demo.py` in the repository built every file of this folder from seeds.
"""
