"""Paired studies: arms at an equal budget, over seeds that share their data, and a verdict.

`compare(study, folder)` runs what is missing of a study and returns its `Analysis`;
`python -m effjax.compare` is the command. A study is data (`spec`), its runs are ordinary runs of
`effjax.train` in folders of their own (`runs`), and everything said about them is computed from
those folders alone (`analysis`, `stats`, `words`).
"""
